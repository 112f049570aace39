"""The index finds what was added, reuses its entries and stays small."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
from blake3 import blake3

from lmcache.core.index import ABSENT, Index, Slot


def key(number):
    return blake3(number.to_bytes(8, "little")).digest()


def slot(number, **changes):
    made = Slot(key(number), 4096 * number, 4096, 2**61 + number, 0)
    return made._replace(**changes)


def test_what_was_added_is_found():
    index = Index()
    entries = [index.add(slot(number)) for number in range(100)]
    assert entries == list(range(100))
    assert len(index) == 100
    for number, entry in enumerate(entries):
        assert key(number) in index
        assert index.find(key(number)) == entry
        assert index.slot(entry, 7) == slot(number, chunk=7)


@pytest.mark.parametrize("size", [4737, 2**31, 2**40])
def test_chunks_of_any_size(size):
    index = Index()
    for _ in range(2):
        entry = index.add(slot(1, size=size))
        assert index.slot(entry, 0).size == size
        index.remove(entry)


def test_what_was_not_added_is_absent():
    index = Index()
    assert index.find(key(1)) == ABSENT
    assert key(1) not in index
    assert len(index) == 0


def test_what_was_removed_is_absent():
    index = Index()
    entry = index.add(slot(1))
    assert index.remove(entry) == key(1)
    assert index.find(key(1)) == ABSENT
    assert len(index) == 0


def test_entries_are_reused_and_forget_what_they_were():
    index = Index()
    entries = [index.add(slot(number)) for number in range(10)]
    for entry in entries[3:6]:
        index.remove(entry)
    other = [slot(number, size=8192) for number in (20, 21, 22, 23)]
    again = [index.add(one) for one in other]
    assert sorted(again) == [3, 4, 5, 10]
    for entry, one in zip(again, other, strict=True):
        assert index.slot(entry, 0) == one
        assert index.pins[entry] == 0
    assert [index.find(key(number)) for number in (2, 6)] == [2, 6]


def test_an_entry_is_removed_once():
    index = Index()
    entry = index.add(slot(1))
    index.remove(entry)
    with pytest.raises(AssertionError, match="removed twice"):
        index.remove(entry)
    with pytest.raises(AssertionError, match="a live entry"):
        index.slot(entry, 0)


def test_a_pinned_entry_is_not_removed():
    index = Index()
    entry = index.add(slot(1))
    index.pins[entry] += 1
    with pytest.raises(AssertionError, match="pinned"):
        index.remove(entry)
    assert index.find(key(1)) == entry


def test_numbers_as_large_as_a_slab_can_make_them():
    index = Index()
    large = slot(1, offset=2**45, size=2**33, generation=2**62 + 1)
    entry = index.add(large)
    assert index.slot(entry, 0) == large
    index.pins[entry] += 100_000  # as many requests may wait for one system prompt


def test_a_chunk_costs_at_most_200_bytes():
    count = 200_000
    gc.collect()
    tracemalloc.start()
    index = Index()
    for number in range(count):
        index.add(slot(number))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used / count <= 200
    assert len(index) == count
