"""The suite is only worth shipping if each broken policy fails the rule it breaks."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path

import pytest

from lmcache.core.eviction import EvictionPolicy
from lmcache.testing import EvictionPolicySuite

pytest_plugins = ["pytester"]


class Queue(EvictionPolicy):
    """First in, first out: keeps every rule. The broken ones below differ by one mistake."""

    def __init__(self):
        self.order = OrderedDict()

    def add(self, entry, key):
        self.order[entry] = key

    def touch(self, entry):
        pass

    def remove(self, entry, *, evicted):
        del self.order[entry]

    def victims(self):
        return iter(self.order)


class OffersASentinel(Queue):
    def victims(self):
        return iter(self.order or [-1])


class KeepsTheNewest(Queue):
    def victims(self):
        entries = iter(self.order)
        last = next(entries, None)
        for entry in entries:
            yield last
            last = entry


class NeverEnds(Queue):
    def victims(self):
        while self.order:
            yield from self.order


class ExpectsTheNextNumber(Queue):
    def add(self, entry, key):
        assert entry <= len(self.order)
        super().add(entry, key)


class RemovesWhomItOffers(Queue):
    def victims(self):
        while self.order:
            yield self.order.popitem(last=False)[0]

    def remove(self, entry, *, evicted):
        self.order.pop(entry, None)


class RemovesUntilTheEnd(RemovesWhomItOffers):
    """Puts back whom it offered, but only if the caller hears it out."""

    def victims(self):
        offered = OrderedDict()
        while self.order:
            entry, key = self.order.popitem(last=False)
            offered[entry] = key
            yield entry
        self.order = offered


class RemovesFromTheFront(Queue):
    """Takes for granted that victims leave in the order in which they were offered."""

    def remove(self, entry, *, evicted):
        if evicted:
            assert next(iter(self.order)) == entry
        super().remove(entry, evicted=evicted)


class RemovesUpToTheVictim(Queue):
    """Takes for granted that nobody offered earlier stays."""

    def victims(self):
        self.offered = []
        for entry in self.order:
            self.offered.append(entry)
            yield entry

    def remove(self, entry, *, evicted):
        if evicted and entry in getattr(self, "offered", []):
            while self.offered and (first := self.offered.pop(0)) != entry:
                self.order.pop(first, None)
        super().remove(entry, evicted=evicted)


class RemovesTheEvictedOnly(Queue):
    def remove(self, entry, *, evicted):
        if evicted:
            super().remove(entry, evicted=evicted)


class BuriesEntries(Queue):
    """Marks the removed for good, though their numbers come back."""

    def __init__(self):
        super().__init__()
        self.gone = set()

    def remove(self, entry, *, evicted):
        self.gone.add(entry)

    def victims(self):
        return (entry for entry in self.order if entry not in self.gone)


class RevivesTheOldEntry(Queue):
    """Remembers which entry a key had, and believes that it has it again."""

    def __init__(self):
        super().__init__()
        self.known = {}

    def add(self, entry, key):
        super().add(self.known.setdefault(key, entry), key)

    def remove(self, entry, *, evicted):
        self.order.pop(entry, None)


class TouchedTwiceIsLost(Queue):
    """Promotes to a queue that it forgets to offer."""

    def __init__(self):
        super().__init__()
        self.used, self.protected = set(), set()

    def touch(self, entry):
        (self.protected if entry in self.used else self.used).add(entry)

    def remove(self, entry, *, evicted):
        super().remove(entry, evicted=evicted)
        self.used.discard(entry)
        self.protected.discard(entry)

    def victims(self):
        return (entry for entry in self.order if entry not in self.protected)


class SharesItsQueue(Queue):
    everyone = OrderedDict()

    def __init__(self):
        self.order = self.everyone


class Searches(Queue):
    def victims(self):
        return iter(sorted(self.order, key=lambda entry: -entry))


class Copies(Queue):
    def victims(self):
        return iter(list(self.order))


class RenewsTheLastOnly(Queue):
    """Of many uses at once."""

    def touch(self, entry):
        self.order.move_to_end(entry)

    def touch_all(self, entries):
        for entry in list(entries)[-1:]:
            self.touch(entry)


class HoldsOnToTheUsed(Queue):
    """Lets go of nobody who was ever used."""

    def __init__(self):
        super().__init__()
        self.used = set()

    def touch(self, entry):
        self.used.add(entry)

    def remove(self, entry, *, evicted):
        if not evicted or entry not in self.used:
            super().remove(entry, evicted=evicted)


BROKEN = {
    OffersASentinel: "test_an_empty_policy_offers_nobody",
    KeepsTheNewest: "test_every_resident_is_offered_exactly_once",
    NeverEnds: "test_every_resident_is_offered_exactly_once",
    ExpectsTheNextNumber: "test_entries_arrive_in_any_order",
    RemovesWhomItOffers: "test_offering_removes_nobody",
    RemovesUntilTheEnd: "test_stopping_early_forgets_nobody",
    RemovesFromTheFront: "test_several_victims_may_leave_at_once",
    RemovesUpToTheVictim: "test_pinned_victims_are_passed_over",
    RemovesTheEvictedOnly: "test_who_is_removed_is_never_offered",
    BuriesEntries: "test_an_entry_is_used_again_under_another_key",
    RevivesTheOldEntry: "test_a_key_returns_under_another_entry",
    TouchedTwiceIsLost: "test_touching_brings_nobody_in_or_out",
    RenewsTheLastOnly: "test_many_uses_at_once_are_uses_in_turn",
    SharesItsQueue: "test_policies_share_nothing",
    Searches: "test_the_first_victim_is_found_without_a_search",
    Copies: "test_the_first_victim_is_found_without_a_copy",
    HoldsOnToTheUsed: "test_any_history_leaves_the_residents_known",
}

MODULE = """
import sys
sys.path.insert(0, {here!r})

import pytest
import {module} as policies
from lmcache.testing import EvictionPolicySuite
"""

SUITE = """
class Test{policy}(EvictionPolicySuite):
    @pytest.fixture
    def new_policy(self):
        return policies.{policy}
"""

REPLACED = """
    def test_offering_removes_nobody(self):
        pass
"""

EXCUSED = """
    @pytest.mark.xfail(reason="see issue 7")
    def test_offering_removes_nobody(self):
        assert False
"""


def write_suites(pytester: pytest.Pytester, *policies: type[Queue], more: str = "") -> None:
    here = Path(__file__)
    suites = [SUITE.format(policy=policy.__name__) for policy in policies]
    module = MODULE.format(here=str(here.parent), module=here.stem)
    pytester.makepyfile(test_it="".join([module, *suites, more]))


def test_each_broken_policy_fails_its_rule(pytester: pytest.Pytester) -> None:
    write_suites(pytester, *BROKEN)
    rules = [f"test_it.py::Test{policy.__name__}::{rule}" for policy, rule in BROKEN.items()]
    result = pytester.runpytest_subprocess("--tb=no", *rules)
    failed = {re.split(r"[ []", line)[1] for line in result.outlines if line.startswith("FAILED")}
    assert failed == set(rules)


def test_every_rule_has_a_policy_that_breaks_it() -> None:
    rules = {name for name in vars(EvictionPolicySuite) if name.startswith("test_")}
    assert set(BROKEN.values()) == rules - {"test_the_suite_is_whole"}


def test_a_sound_policy_passes(pytester: pytest.Pytester) -> None:
    write_suites(pytester, Queue)
    result = pytester.runpytest_subprocess()
    assert set(result.parseoutcomes()) == {"passed"}


def test_a_rule_cannot_be_replaced(pytester: pytest.Pytester) -> None:
    write_suites(pytester, Queue, more=REPLACED)
    result = pytester.runpytest_subprocess("-k", "whole")
    assert result.parseoutcomes()["failed"] == 1
    result.stdout.fnmatch_lines(["*test_offering_removes_nobody is replaced; mark it xfail*"])


def test_a_rule_can_be_excused_with_a_reason(pytester: pytest.Pytester) -> None:
    write_suites(pytester, Queue, more=EXCUSED)
    outcome = pytester.runpytest_subprocess("-k", "whole or offering").parseoutcomes()
    assert (outcome["passed"], outcome["xfailed"]) == (1, 1)


def test_a_failure_says_what_differs(pytester: pytest.Pytester) -> None:
    """The suite's asserts are rewritten, wherever it is installed."""
    write_suites(pytester, KeepsTheNewest)
    result = pytester.runpytest_subprocess("-k", "exactly_once")
    result.stdout.fnmatch_lines(["*Right contains one more item: 19*"])
