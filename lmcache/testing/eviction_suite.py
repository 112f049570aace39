"""The contract of `EvictionPolicy`, as tests anyone can run."""

from __future__ import annotations

import hashlib
import inspect
import random
import sys
import tracemalloc
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lmcache.core.keys import ChunkKey

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from types import FrameType

    from lmcache.core.eviction import EvictionPolicy

FEW = 20
MANY = 1024


def key(n: int) -> ChunkKey:
    """The `n`-th of many keys that have nothing in common."""
    return ChunkKey(hashlib.sha256(n.to_bytes(8, "big")).digest())


def fill(policy: EvictionPolicy, entries: Iterable[int]) -> None:
    """Make `entries` resident, each under the key of its own number."""
    for entry in entries:
        policy.add(entry, key(entry))


def offers(policy: EvictionPolicy) -> Iterator[int]:
    """What `policy` offers, cut short so that one that never ends fails and does not hang."""
    return islice(policy.victims(), 2 * MANY)


def assert_offers(policy: EvictionPolicy, residents: Collection[int]) -> None:
    """`policy` offers all of `residents`, nothing else, and nothing twice."""
    assert sorted(offers(policy)) == sorted(residents)


def evict(policy: EvictionPolicy, most: int, pinned: Collection[int] = ()) -> list[int]:
    """Evict the first `most` victims that are not `pinned`, as the index does it."""
    chosen = list(islice((e for e in offers(policy) if e not in pinned), most))
    for entry in chosen:
        policy.remove(entry, evicted=True)
    return chosen


def churn(policy: EvictionPolicy, rounds: int) -> None:
    """Replace the first victim by a newcomer again and again, with a use now and then."""
    for i in range(rounds):
        (victim,) = evict(policy, 1)
        policy.add(victim, key(rounds + i))
        policy.touch(i * 7919 % rounds)


def count_lines(work: Callable[[], None]) -> int:
    """How many lines of Python `work` runs."""
    lines = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


class History(RuleBasedStateMachine):
    """What an index may do to a policy, next to the entries that are resident and their keys."""

    numbers = st.integers(0, 11)

    def __init__(self, policy: EvictionPolicy) -> None:
        super().__init__()
        self.policy = policy
        self.residents: dict[int, int] = {}

    def resident(self, n: int) -> int:
        """The `n`-th resident, so that no step is wasted on an entry that is not there."""
        return sorted(self.residents)[n % len(self.residents)]

    @rule(entry=numbers, number=numbers)
    def add(self, entry: int, number: int) -> None:
        entry = next(e for e in count(entry) if e not in self.residents)
        number = next(n for n in count(number) if n not in self.residents.values())
        self.policy.add(entry, key(number))
        self.residents[entry] = number

    @precondition(lambda self: self.residents)
    @rule(n=numbers)
    def touch(self, n: int) -> None:
        self.policy.touch(self.resident(n))

    @precondition(lambda self: self.residents)
    @rule(n=numbers, evicted=st.booleans())
    def remove(self, n: int, evicted: bool) -> None:
        entry = self.resident(n)
        self.policy.remove(entry, evicted=evicted)
        del self.residents[entry]

    @precondition(lambda self: self.residents)
    @rule(most=st.integers(1, 4), pinned=st.sets(numbers, max_size=3))
    def make_room(self, most: int, pinned: set[int]) -> None:
        candidates = self.residents.keys() - pinned
        chosen = evict(self.policy, most, pinned)
        assert len(chosen) == min(most, len(candidates))
        assert candidates.issuperset(chosen)
        for entry in chosen:
            del self.residents[entry]

    @rule()
    def offer(self) -> None:
        assert_offers(self.policy, self.residents)


class EvictionPolicySuite:
    """Subclass, provide `new_policy`, and every rule below is checked.

    Which entry should leave first is the policy's own business; these rules are what the index
    relies on whatever the answer.
    """

    @pytest.fixture
    def new_policy(self) -> Callable[[], EvictionPolicy]:
        """Builds a policy with no residents each time it is called."""
        raise NotImplementedError("override the new_policy fixture")

    @pytest.fixture
    def policy(self, new_policy: Callable[[], EvictionPolicy]) -> EvictionPolicy:
        """A policy with no residents."""
        return new_policy()

    def test_the_suite_is_whole(self) -> None:
        """A rule may be marked xfail with a reason; it may not be replaced."""
        for name, law in inspect.getmembers(EvictionPolicySuite, inspect.isfunction):
            mine = getattr(type(self), name)
            if not name.startswith("test_") or mine is law:
                continue
            marks = getattr(mine, "pytestmark", [])
            assert any(m.name == "xfail" and m.kwargs.get("reason") for m in marks), (
                f"{name} is replaced; mark it xfail(reason=...) instead"
            )

    def test_an_empty_policy_offers_nobody(self, policy: EvictionPolicy) -> None:
        assert_offers(policy, ())

    def test_every_resident_is_offered_exactly_once(self, policy: EvictionPolicy) -> None:
        fill(policy, range(FEW))
        assert_offers(policy, range(FEW))

    def test_entries_arrive_in_any_order(self, policy: EvictionPolicy) -> None:
        entries = [FEW * FEW, 3, FEW, 0, 7]
        fill(policy, entries)
        assert_offers(policy, entries)

    def test_offering_removes_nobody(self, policy: EvictionPolicy) -> None:
        fill(policy, range(FEW))
        for _ in range(5):
            assert_offers(policy, range(FEW))

    def test_stopping_early_forgets_nobody(self, policy: EvictionPolicy) -> None:
        fill(policy, range(FEW))
        for stop in range(FEW):
            assert len(list(islice(policy.victims(), stop))) == stop
        assert_offers(policy, range(FEW))

    def test_several_victims_may_leave_at_once(self, policy: EvictionPolicy) -> None:
        """In whatever order the caller removes them, once it has stopped iterating."""
        fill(policy, range(FEW))
        chosen = list(islice(policy.victims(), FEW // 2))
        for entry in reversed(chosen):
            policy.remove(entry, evicted=True)
        assert_offers(policy, set(range(FEW)) - set(chosen))

    def test_pinned_victims_are_passed_over(self, policy: EvictionPolicy) -> None:
        fill(policy, range(FEW))
        pinned = set(islice(policy.victims(), 3))
        chosen = evict(policy, 5, pinned)
        assert len(chosen) == 5
        assert_offers(policy, set(range(FEW)) - set(chosen))

    @pytest.mark.parametrize("evicted", [True, False], ids=["evicted", "dropped"])
    def test_who_is_removed_is_never_offered(self, policy: EvictionPolicy, evicted: bool) -> None:
        residents = set(range(FEW))
        fill(policy, residents)
        # oldest and newest, the middle, and so on until nobody is left
        for entry in sorted(residents, key=lambda e: (e % 5, -e)):
            policy.remove(entry, evicted=evicted)
            residents.discard(entry)
            assert_offers(policy, residents)

    @pytest.mark.parametrize("evicted", [True, False], ids=["evicted", "dropped"])
    def test_an_entry_is_used_again_under_another_key(
        self, policy: EvictionPolicy, evicted: bool
    ) -> None:
        fill(policy, range(FEW))
        for i in range(3 * FEW):
            policy.touch(i % FEW)
            policy.remove(i % FEW, evicted=evicted)
            policy.add(i % FEW, key(FEW + i))
        assert_offers(policy, range(FEW))

    @pytest.mark.parametrize("evicted", [True, False], ids=["evicted", "dropped"])
    def test_a_key_returns_under_another_entry(self, policy: EvictionPolicy, evicted: bool) -> None:
        fill(policy, range(FEW))
        for entry in range(FEW // 2):
            policy.remove(entry, evicted=evicted)
        for entry in range(FEW // 2):
            policy.add(FEW + entry, key(entry))
        assert_offers(policy, range(FEW // 2, FEW + FEW // 2))

    def test_touching_brings_nobody_in_or_out(self, policy: EvictionPolicy) -> None:
        fill(policy, range(FEW))
        for times in range(FEW):
            for _ in range(times):
                policy.touch(times)
        assert_offers(policy, range(FEW))

    def test_many_uses_at_once_are_uses_in_turn(
        self, new_policy: Callable[[], EvictionPolicy]
    ) -> None:
        one, other = new_policy(), new_policy()
        fill(one, range(FEW))
        fill(other, range(FEW))
        rng = random.Random(FEW)  # noqa: S311 - which uses does not matter
        for most in range(40):
            start, step = rng.randrange(FEW), rng.choice((-1, 1))
            used = [(start + step * n) % FEW for n in range(rng.randint(0, most))]
            if rng.random() < 0.3:
                used = rng.choices(range(FEW), k=most)
            one.touch_all(used)
            for entry in used:
                other.touch(entry)
            assert list(offers(one)) == list(offers(other))

    def test_policies_share_nothing(self, new_policy: Callable[[], EvictionPolicy]) -> None:
        one, other = new_policy(), new_policy()
        fill(one, range(FEW))
        assert_offers(other, ())
        fill(other, range(3))
        other.remove(0, evicted=True)
        assert_offers(one, range(FEW))

    def test_the_first_victim_is_found_without_a_search(self, policy: EvictionPolicy) -> None:
        """Counted in lines of Python, so a search that C code makes goes unseen."""
        fill(policy, range(MANY))
        assert count_lines(lambda: churn(policy, MANY)) / MANY < MANY / 4

    def test_the_first_victim_is_found_without_a_copy(self, policy: EvictionPolicy) -> None:
        """No list of the residents is made to offer the first of them."""
        fill(policy, range(MANY))
        allocated = 0
        tracemalloc.start()
        try:
            for i in range(MANY):
                before, _ = tracemalloc.get_traced_memory()
                tracemalloc.reset_peak()
                victim = next(policy.victims())
                allocated += tracemalloc.get_traced_memory()[1] - before
                policy.remove(victim, evicted=True)
                policy.add(victim, key(MANY + i))
        finally:
            tracemalloc.stop()
        assert allocated / MANY < 2 * MANY

    def test_any_history_leaves_the_residents_known(
        self, new_policy: Callable[[], EvictionPolicy]
    ) -> None:
        class Fresh(History):
            def __init__(self) -> None:
                super().__init__(new_policy())

        run_state_machine_as_test(
            Fresh, settings=settings(deadline=None, report_multiple_bugs=False)
        )


__all__ = ["EvictionPolicySuite"]
