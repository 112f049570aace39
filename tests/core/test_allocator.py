"""The allocator against a map of grains in which nothing can go wrong."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from lmcache.core.allocator import Allocator

GRAIN = 16
START = 1 << 40


class AgainstAMap(RuleBasedStateMachine):
    """Grain by grain: True is taken."""

    places = Bundle("places")

    @initialize(grains=st.integers(1, 40), rest=st.integers(0, GRAIN - 1))
    def create(self, grains, rest):
        self.map = [False] * grains
        self.allocator = Allocator(grains * GRAIN + rest, start=START, grain=GRAIN)
        assert self.allocator.capacity == grains * GRAIN

    def gaps(self):
        """Length and start of each stretch of free grains."""
        found, at = [], 0
        for taken, stretch in groupby(self.map):
            length = len(list(stretch))
            if not taken:
                found.append((length, at))
            at += length
        return found

    @rule(target=places, size=st.integers(1, 12 * GRAIN))
    def allocate(self, size):
        grains = -(-size // GRAIN)
        assert self.allocator.rounded(size) == grains * GRAIN
        fitting = [gap for gap in self.gaps() if gap[0] >= grains]
        offset = self.allocator.allocate(size)
        if not fitting:
            assert offset is None
            return multiple()
        assert offset is not None, "there was a gap, so free ranges are not joined"
        first, odd = divmod(offset - START, GRAIN)
        assert odd == 0
        smallest = min(length for length, _ in fitting)
        assert (smallest, first) in fitting, "not the start of a smallest gap that fits"
        self.map[first : first + grains] = [True] * grains
        return offset, size

    @rule(place=consumes(places))
    def free(self, place):
        offset, size = place
        self.allocator.free(offset, size)
        first, grains = (offset - START) // GRAIN, -(-size // GRAIN)
        assert all(self.map[first : first + grains])
        self.map[first : first + grains] = [False] * grains

    @invariant()
    def free_bytes_are_right(self):
        if hasattr(self, "map"):
            assert self.allocator.free_bytes == self.map.count(False) * GRAIN


TestAgainstAMap = AgainstAMap.TestCase
TestAgainstAMap.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def test_all_of_it_can_be_taken_and_no_more():
    allocator = Allocator(10 * GRAIN, grain=GRAIN)
    assert allocator.allocate(10 * GRAIN + 1) is None
    assert allocator.allocate(10 * GRAIN) == 0
    assert allocator.allocate(1) is None
    assert allocator.free_bytes == 0
    allocator.free(0, 10 * GRAIN)
    assert allocator.allocate(10 * GRAIN) == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (2, 0, 1), (1, 0, 2)])
def test_neighbours_join_whatever_the_order(order):
    allocator = Allocator(3 * GRAIN, grain=GRAIN)
    places = sorted(allocator.allocate(GRAIN) for _ in range(3))
    for index in order:
        allocator.free(places[index], GRAIN)
    assert allocator.allocate(3 * GRAIN) == 0


@pytest.mark.parametrize("capacity", [0, 1, GRAIN - 1, -1, -5000])
def test_less_than_a_grain_is_nothing(capacity):
    allocator = Allocator(capacity, grain=GRAIN)
    assert allocator.capacity == allocator.free_bytes == 0
    assert allocator.allocate(1) is None


def test_a_hundred_thousand_gaps():
    """Bookkeeping stays right, and the smallest gap is found among many."""
    allocator = Allocator(200_001 * GRAIN, grain=GRAIN)
    places = [allocator.allocate(GRAIN) for _ in range(200_000)]
    assert len(set(places)) == 200_000
    for offset in places[::2]:
        allocator.free(offset, GRAIN)
    taken = set(places[1::2])
    assert allocator.allocate(GRAIN) not in taken
    assert allocator.allocate(3 * GRAIN) is None
    for offset in places[1::2]:
        allocator.free(offset, GRAIN)
    assert allocator.free_bytes == allocator.capacity - GRAIN
