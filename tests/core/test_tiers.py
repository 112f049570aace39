"""Slower tiers may fail, dawdle, lie or hang: it is a miss, it is counted, and nothing leaks."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import rig
from blake3 import blake3

from lmcache.backends.memory import MemoryBackend
from lmcache.core import tier as tier_module
from lmcache.core.backend import Capabilities
from lmcache.core.errors import BackendError, ConfigError
from lmcache.core.fetch import Asking
from lmcache.core.objects import HEADER_BYTES, Description, is_intact
from lmcache.core.receipts import Reason
from lmcache.core.tier import Tier
from lmcache.core.write_policy import WritePolicy
from lmcache.plugins.manager import PluginManager
from lmcache.testing.faults import Corrupting, Flaky, Slow, Wrapper

PAGE, CHUNK, PAGES = rig.PAGE_TOKENS, rig.CHUNK_TOKENS, rig.PAGES_PER_CHUNK
GEOMETRY = rig.geometry()


def on_purpose():
    """An error of its own each time: its traceback holds what was looked at."""
    return BackendError("on purpose")


def disk_full():
    return OSError(28, "no space left")


class Backend(Wrapper):
    """Memory that outlives its tier, notes what is asked of it, and does what a test says."""

    def __init__(self):
        super().__init__(MemoryBackend())
        self.calls = []
        self.gate = threading.Event()
        self.gate.set()
        self.error = None
        self.only = ()
        self.closed = 0

    def _called(self, name):
        self.calls.append(name)
        if not self.only or name in self.only:
            assert self.gate.wait(30)
            if self.error:
                raise self.error()

    def put(self, key, data):
        self._called("put")
        return super().put(key, data)

    def get_into(self, key, out):
        self._called("get_into")
        return super().get_into(key, out)

    def contains(self, key):
        self._called("contains")
        return super().contains(key)

    def count_leading(self, keys):
        self._called("count_leading")
        return super().count_leading(keys)

    def discard_damaged(self, key):
        self._called("discard_damaged")
        return super().discard_damaged(key)

    def close(self):
        self.closed += 1

    def held(self):
        return dict(self.backend._objects)


class Cache:
    """A decider and its tiers, as one engine sees them."""

    def __init__(self, workshop, *backends, slots=8, keep=True, lease_s=300.0, **options):
        self.decider = workshop.decider(slots, keep=keep, lease_s=lease_s)
        self.tiers = workshop.tiers(self.decider, *backends, **options)
        self.owners = 0

    @property
    def counters(self):
        return self.decider.counters

    def store(self, sequence, *, start=0, flush=True, tail=True):
        chain = rig.chain(sequence)
        slots, reason = self.decider.reserve(chain, GEOMETRY, start, len(sequence), tail=tail)
        for slot in slots:
            self.payload(slot)[:] = expected(slot)
            where = slot.offset + GEOMETRY.tag_offset(0)
            self.decider.slab.write_word(where, slot.generation)
            self.decider.commit(slot, GEOMETRY)
        if flush:
            self.tiers.flush()
        return reason

    def payload(self, slot):
        return self.decider.slab.view[slot.offset + HEADER_BYTES : slot.offset + slot.size]

    def ask(self, sequence, owner="r", stop=None):
        """One look, which may say that a tier is being read."""
        stop = len(sequence) if stop is None else stop
        return self.tiers.lookup(owner, rig.chain(sequence), GEOMETRY, stop)

    def lookup(self, sequence, owner=None, *, release=True):
        """The hit in the end; every slot of it holds what it must."""
        self.owners += 1
        owner = owner or f"r{self.owners}"
        while (hit := self.ask(sequence, owner)) is None:
            self.tiers.wait(owner)
        for slot in hit.slots:
            assert self.payload(slot) == expected(slot), "a hit on foreign bytes"
            word = self.decider.slab.read_word(slot.offset + GEOMETRY.tag_offset(0))
            assert word == slot.generation, "movers would refuse it"
        self.tiers.forget(owner)
        if release:
            self.decider.release(hit.lease)
        assert sum(hit.receipt.by_tier.values()) == hit.tokens
        return hit

    def assert_idle(self):
        self.tiers.flush()
        assert not self.tiers._fetches
        rig.assert_idle(self.decider)


def expected(slot):
    return blake3(slot.key).digest(length=GEOMETRY.bytes_in([slot]))


@pytest.fixture
def backend():
    made = Backend()
    yield made
    made.gate.set()


@pytest.fixture
def new_cache(workshop):
    return lambda *backends, **options: Cache(workshop, *backends, **options)


@pytest.fixture
def stored(new_cache, backend):
    """A backend that another engine has filled; call it with the tokens to store."""

    def store(*sequences, into=backend):
        cache = new_cache(into, slots=64)
        for sequence in sequences:
            cache.store(sequence)
        cache.tiers.close()
        into.calls.clear()
        return into

    return store


class TestWriting:
    def test_a_complete_chunk_goes_to_every_tier(self, new_cache):
        one, other = Backend(), Backend()
        cache = new_cache(one, other)
        cache.store(rig.tokens(2 * CHUNK + PAGE))
        assert len(one.held()) == 3
        assert one.held() == other.held()
        cache.assert_idle()

    def test_what_is_written_describes_and_checks_itself(self, new_cache, backend):
        new_cache(backend).store(rig.tokens(CHUNK + 2 * PAGE))
        chain = rig.chain(rig.tokens(CHUNK + 2 * PAGE))
        for key, pages in ((chain.key(0), PAGES), (chain.tail(1, 2), 2)):
            size = pages * rig.PAGE_BYTES
            about = Description(key, chain.root, GEOMETRY.layout, pages * PAGE, size)
            assert is_intact(memoryview(backend.held()[key]), about)

    def test_what_was_read_is_not_written_again(self, new_cache, stored):
        backend = stored(rig.tokens(2 * CHUNK))
        new_cache(backend).lookup(rig.tokens(2 * CHUNK))
        assert "put" not in backend.calls

    def test_a_chunk_stays_while_it_is_written(self, new_cache, backend):
        cache = new_cache(backend, slots=4)
        backend.gate.clear()
        cache.store(rig.tokens(2 * CHUNK), flush=False)
        assert cache.store(rig.tokens(3 * CHUNK, 1), flush=False) is Reason.NO_ROOM
        assert cache.lookup(rig.tokens(2 * CHUNK)).tokens == 2 * CHUNK
        backend.gate.set()
        cache.tiers.flush()
        assert cache.store(rig.tokens(4 * CHUNK, 2)) is Reason.NONE
        cache.assert_idle()

    def test_the_queue_is_bounded(self, new_cache, backend):
        cache = new_cache(backend, queue=3, depth=1)
        backend.gate.clear()
        cache.store(rig.tokens(8 * CHUNK), flush=False)
        assert cache.counters["tier_dropped"] == 5
        assert cache.lookup(rig.tokens(8 * CHUNK)).tokens == 8 * CHUNK, (
            "they are in L1 all the same"
        )
        backend.gate.set()
        cache.tiers.flush()
        assert len(backend.held()) == 3
        rig.wait_until(lambda: not cache.tiers._writes._tiers[0].writes)
        cache.store(rig.tokens(3 * CHUNK, 1))
        assert len(backend.held()) == 6, "and then there is room in it again"
        cache.assert_idle()

    def test_a_failed_write_is_counted_and_forgotten(self, new_cache, backend):
        cache = new_cache(backend)
        backend.error = on_purpose
        cache.store(rig.tokens(CHUNK))
        assert (cache.counters["tier_errors"], cache.counters["tier_dropped"]) == (1, 1)
        assert cache.lookup(rig.tokens(CHUNK)).tokens == CHUNK
        cache.assert_idle()

    def test_a_refused_write_is_counted(self, new_cache):
        cache = new_cache(MemoryBackend(max_size=100))
        cache.store(rig.tokens(2 * CHUNK))
        assert (cache.counters["tier_errors"], cache.counters["tier_dropped"]) == (0, 2)

    @pytest.mark.parametrize("error", [KeyError, disk_full, AssertionError])
    def test_an_error_that_breaks_the_contract_is_a_failed_write(self, new_cache, backend, error):
        cache = new_cache(backend)
        backend.error = error
        cache.store(rig.tokens(2 * CHUNK))
        assert cache.counters["tier_errors"] == 2
        cache.assert_idle()

    def test_one_tier_fails_and_the_next_is_written(self, new_cache, backend):
        backend.error = on_purpose
        healthy = Backend()
        new_cache(backend, healthy).store(rig.tokens(2 * CHUNK))
        assert len(healthy.held()) == 2


class TestWhenItIsWritten:
    def test_never(self, new_cache, backend):
        cache = new_cache(backend, write="never")
        cache.store(rig.tokens(4 * CHUNK))
        cache.lookup(rig.tokens(4 * CHUNK))
        assert not backend.held()
        cache.assert_idle()

    def test_what_is_never_written_is_read(self, new_cache, stored):
        cache = new_cache(stored(rig.tokens(2 * CHUNK)), write="never")
        assert cache.lookup(rig.tokens(2 * CHUNK)).tokens == 2 * CHUNK

    def test_after_it_was_seen_often_enough(self, new_cache, backend):
        cache = new_cache(backend, write="after-3")
        cache.store(rig.tokens(2 * CHUNK))
        cache.store(rig.tokens(CHUNK, 1))
        assert not backend.held(), "stored: once"
        cache.lookup(rig.tokens(2 * CHUNK))
        assert not backend.held(), "and found: twice"
        cache.store(rig.tokens(CHUNK))  # it would have been stored again
        cache.tiers.flush()
        assert set(backend.held()) == {rig.chain(rig.tokens(CHUNK)).key(0)}
        cache.lookup(rig.tokens(2 * CHUNK))
        cache.lookup(rig.tokens(2 * CHUNK))
        cache.tiers.flush()
        assert (len(backend.held()), backend.calls.count("put")) == (2, 2)
        cache.assert_idle()

    def test_sightings_outlive_the_chunk(self, new_cache, backend):
        cache = new_cache(backend, write="after-2")
        for _ in range(2):
            cache.store(rig.tokens(CHUNK))
            cache.decider.clear()
        assert len(backend.held()) == 1

    def test_before_it_leaves_memory(self, new_cache, backend):
        cache = new_cache(backend, slots=16, write="evict")
        cache.store(rig.tokens(14 * CHUNK))
        assert not backend.held()
        cache.store(rig.tokens(CHUNK, 1))
        cache.store(rig.tokens(CHUNK, 2))
        assert 0 < len(backend.held()) <= 8
        for seed in range(3, 20):
            cache.store(rig.tokens(CHUNK, seed))
        assert cache.counters["evictions"] >= 15
        assert cache.counters["tier_dropped"] == 0
        everything = {rig.chain(rig.tokens(14 * CHUNK)).key(n) for n in range(14)}
        assert everything <= set(backend.held())
        assert backend.calls.count("put") == len(backend.held()), "each once"
        cache.assert_idle()

    def test_what_leaves_too_fast_is_counted(self, new_cache, backend):
        cache = new_cache(backend, slots=4, write="evict", depth=1)
        backend.gate.clear()
        for seed in range(8):
            cache.store(rig.tokens(CHUNK, seed), flush=False)
        assert cache.counters["tier_dropped"] > 0
        backend.gate.set()
        cache.assert_idle()

    def test_what_was_read_is_not_written_when_it_leaves(self, new_cache, stored):
        backend = stored(rig.tokens(4 * CHUNK))
        cache = new_cache(backend, slots=4, write="evict")
        cache.lookup(rig.tokens(4 * CHUNK))
        cache.store(rig.tokens(2 * CHUNK, 1))
        cache.tiers.flush()
        assert backend.calls.count("put") <= 2, "at most what an engine has stored since"
        cache.assert_idle()

    def test_what_was_read_is_not_written_to_later_tiers_however_often_it_is_found(
        self, new_cache, stored
    ):
        cache = new_cache(stored(rig.tokens(CHUNK)), other := Backend(), write="after-2")
        for _ in range(4):
            assert cache.lookup(rig.tokens(CHUNK)).tokens == CHUNK
        cache.tiers.flush()
        assert not other.held()

    @pytest.mark.parametrize("text", ["", "late", "after-0", "after-x", "after-1000000", "Through"])
    def test_what_is_no_policy(self, text):
        with pytest.raises(ConfigError, match="is none of through, evict, never and after-N"):
            WritePolicy.parse(text)


class TestPromotion:
    """What is read from a tier is written to the faster ones before it."""

    @pytest.fixture
    def far(self, stored):
        return stored(rig.tokens(2 * CHUNK + PAGE))

    def test_the_tiers_before_it_get_what_a_tier_gave(self, new_cache, far):
        one, other, last = Backend(), Backend(), Backend()
        cache = new_cache(one, other, far, last)
        assert cache.lookup(rig.tokens(2 * CHUNK + PAGE)).receipt.by_tier["t2"] == 2 * CHUNK + PAGE
        cache.tiers.flush()
        assert one.held() == other.held()
        assert one.held().keys() == far.held().keys()
        assert (last.held(), far.calls.count("put")) == ({}, 0)
        assert cache.counters.copy().get(("tier_written", "t0")) == 3
        assert cache.counters["tier_dropped"] == 0
        cache.assert_idle()

    def test_the_next_read_is_of_the_faster_tier(self, new_cache, far):
        near = Backend()
        cache = new_cache(near, far)
        cache.lookup(rig.tokens(2 * CHUNK))
        cache.tiers.flush()
        cache.decider.clear()
        assert cache.lookup(rig.tokens(2 * CHUNK)).receipt.by_tier == {"l1": 0, "t0": 2 * CHUNK}
        cache.assert_idle()

    def test_what_a_faster_tier_has_already_is_not_written_to_it(self, new_cache, stored, far):
        near = stored(rig.tokens(2 * CHUNK), into=Backend())
        near.remove(rig.chain(rig.tokens(CHUNK)).key(0))
        cache = new_cache(near, far)
        assert cache.lookup(rig.tokens(2 * CHUNK)).receipt.by_tier == {"l1": 0, "t1": 2 * CHUNK}
        cache.tiers.flush()
        assert (len(near.held()), near.calls.count("put")) == (2, 1)
        assert cache.counters.copy()["tier_written", "t0"] == 1
        cache.assert_idle()

    def test_a_tier_that_is_never_written_is_not(self, new_cache, far):
        cache = new_cache(near := Backend(), far, write="never")
        assert cache.lookup(rig.tokens(2 * CHUNK)).tokens == 2 * CHUNK
        cache.tiers.flush()
        assert not near.held()
        cache.assert_idle()

    @pytest.mark.parametrize("keep", [True, False])
    def test_after_it_was_found_often_enough(self, new_cache, far, keep):
        cache = new_cache(near := Backend(), far, write="after-3", keep=keep)
        for held in (0, 0, 2, 2):
            assert cache.lookup(rig.tokens(2 * CHUNK)).tokens == 2 * CHUNK
            cache.tiers.flush()
            assert len(near.held()) == held
        assert near.calls.count("put") == 2
        cache.assert_idle()

    def test_what_was_found_often_enough_long_ago(self, new_cache, far):
        cache = new_cache(near := Backend(), far, write="after-2")
        for _ in range(3):
            cache.lookup(rig.tokens(CHUNK))
        cache.tiers.flush()
        near.remove(rig.chain(rig.tokens(CHUNK)).key(0))
        cache.decider.clear()
        cache.lookup(rig.tokens(CHUNK))
        cache.tiers.flush()
        assert len(near.held()) == 1
        cache.assert_idle()

    def test_before_it_leaves_memory(self, new_cache, far):
        cache = new_cache(near := Backend(), far, slots=16, write="evict")
        cache.lookup(rig.tokens(2 * CHUNK))
        cache.tiers.flush()
        assert not near.held()
        for seed in range(1, 40):
            cache.store(rig.tokens(CHUNK, seed))
        assert {rig.chain(rig.tokens(2 * CHUNK)).key(n) for n in range(2)} <= set(near.held())
        assert cache.counters["tier_dropped"] == 0
        cache.assert_idle()

    def test_what_no_late_tier_lacks_is_not_counted_when_it_leaves(self, new_cache, far):
        never, evict = WritePolicy.parse("never"), WritePolicy.parse("evict")
        near = Tier("t0", Backend(), write=never)
        cache = new_cache(near, Tier("t1", far, write=evict), slots=4)
        cache.lookup(rig.tokens(2 * CHUNK))
        far.gate.clear()
        cache.store(rig.tokens(4 * CHUNK, 1), flush=False)
        assert cache.counters["evictions"] == 2
        assert cache.counters["tier_dropped"] == 0
        far.gate.set()
        cache.assert_idle()

    def test_the_queue_is_bounded(self, new_cache, far):
        near = Backend()
        near.gate.clear()
        near.only = ("put",)
        cache = new_cache(near, far, queue=1, depth=1)
        assert cache.lookup(rig.tokens(2 * CHUNK + PAGE)).tokens == 2 * CHUNK + PAGE
        assert cache.counters.copy()["tier_dropped", "t0"] == 2
        near.gate.set()
        cache.tiers.flush()
        assert len(near.held()) == 1
        cache.assert_idle()

    @pytest.mark.parametrize("queue", [0, 8])
    def test_without_memory_to_keep_it_in(self, new_cache, far, queue):
        cache = new_cache(near := Backend(), far, keep=False, queue=queue)
        assert cache.lookup(rig.tokens(2 * CHUNK)).tokens == 2 * CHUNK
        cache.tiers.flush()
        assert (len(near.held()), len(cache.decider)) == (2 if queue else 0, 0)

    @pytest.mark.parametrize("call", ["contains", "put"])
    def test_a_faster_tier_that_fails_is_in_nobodys_way(self, new_cache, far, call):
        near = Backend()
        near.error, near.only = on_purpose, (call,)
        cache = new_cache(near, far)
        assert cache.lookup(rig.tokens(CHUNK)).tokens == CHUNK
        cache.tiers.flush()
        counts = cache.counters.copy()
        assert (counts["tier_errors", "t0"], counts["tier_dropped", "t0"]) == (1, 1)
        cache.assert_idle()

    def test_what_a_lossy_tier_gave_goes_nowhere(self, new_cache, far):
        cache = new_cache(near := Backend(), Tier("t1", far, exact=False))
        assert cache.lookup(rig.tokens(2 * CHUNK)).tokens == 2 * CHUNK
        cache.tiers.flush()
        assert "put" not in near.calls
        cache.assert_idle()


class TestNotKeeping:
    def test_a_chunk_is_gone_from_l1_once_it_is_written(self, new_cache, backend):
        cache = new_cache(backend, keep=False)
        backend.gate.clear()
        cache.store(rig.tokens(2 * CHUNK), flush=False)
        assert len(cache.decider) == 2
        backend.gate.set()
        cache.tiers.flush()
        assert (len(cache.decider), len(backend.held())) == (0, 2)
        assert cache.decider.free_bytes == cache.decider.capacity_bytes

    def test_a_chunk_that_is_read_back_is_gone_after_its_last_reader(self, new_cache, backend):
        cache = new_cache(backend, keep=False)
        cache.store(rig.tokens(2 * CHUNK))
        one = cache.lookup(rig.tokens(2 * CHUNK), release=False)
        other = cache.lookup(rig.tokens(2 * CHUNK), release=False)
        assert (one.tokens, other.tokens, len(cache.decider)) == (2 * CHUNK, 2 * CHUNK, 2)
        cache.decider.release(one.lease)
        assert len(cache.decider) == 2
        cache.decider.release(other.lease)
        assert len(cache.decider) == 0

    def test_a_chunk_for_which_the_queue_has_no_room_is_gone_at_once(self, new_cache, backend):
        cache = new_cache(backend, keep=False, queue=1, depth=1)
        backend.gate.clear()
        cache.store(rig.tokens(3 * CHUNK), flush=False)
        assert len(cache.decider) == 1
        backend.gate.set()
        cache.assert_idle()

    def test_a_chunk_that_could_not_be_written_is_gone_as_well(self, new_cache, backend):
        backend.error = on_purpose
        cache = new_cache(backend, keep=False)
        cache.store(rig.tokens(2 * CHUNK))
        assert len(cache.decider) == 0


class TestReading:
    def test_a_prefix_comes_back(self, new_cache, stored):
        cache = new_cache(stored(rig.tokens(3 * CHUNK + 2 * PAGE)))
        hit = cache.lookup(rig.tokens(3 * CHUNK + 2 * PAGE))
        assert (hit.tokens, hit.receipt.reason) == (3 * CHUNK + 2 * PAGE, Reason.NONE)
        assert hit.receipt.by_tier == {"l1": 0, "t0": 3 * CHUNK + 2 * PAGE}
        assert hit.receipt.bytes == (3 * PAGES + 2) * rig.PAGE_BYTES
        again = cache.lookup(rig.tokens(3 * CHUNK + 2 * PAGE))
        assert again.receipt.by_tier == {"l1": 3 * CHUNK + 2 * PAGE}
        cache.assert_idle()

    def test_the_caller_is_not_kept_waiting(self, new_cache, stored):
        backend = stored(rig.tokens(CHUNK))
        cache = new_cache(backend)
        backend.gate.clear()
        assert cache.ask(rig.tokens(CHUNK)) is None
        assert cache.ask(rig.tokens(CHUNK)) is None
        backend.gate.set()
        assert cache.lookup(rig.tokens(CHUNK), owner="r").tokens == CHUNK

    def test_what_l1_has_is_not_read(self, new_cache, stored):
        backend = stored(rig.tokens(4 * CHUNK))
        cache = new_cache(backend)
        cache.lookup(rig.tokens(2 * CHUNK))
        backend.calls.clear()
        hit = cache.lookup(rig.tokens(4 * CHUNK))
        assert hit.receipt.by_tier == {"l1": 2 * CHUNK, "t0": 2 * CHUNK}
        assert backend.calls == ["count_leading", "get_into", "get_into"]

    @pytest.mark.parametrize("length", [PAGE - 1, CHUNK])
    def test_no_tier_is_asked_without_need(self, new_cache, backend, length):
        cache = new_cache(backend)
        cache.store(rig.tokens(CHUNK))
        backend.calls.clear()
        assert cache.ask(rig.tokens(length)) is not None
        assert backend.calls == []

    def test_what_is_being_written_is_not_read(self, new_cache, stored):
        backend = stored(rig.tokens(CHUNK))
        cache = new_cache(backend)
        chain = rig.chain(rig.tokens(CHUNK))
        [slot], _ = cache.decider.reserve(chain, GEOMETRY, 0, CHUNK, tail=True)
        assert cache.ask(rig.tokens(CHUNK)).receipt.reason is Reason.BEING_WRITTEN
        cache.decider.abandon(slot)

    def test_a_chunk_that_is_stored_meanwhile_is_not_read_twice(self, new_cache, stored):
        """The engine computes what is being fetched, and commits it first."""
        backend = stored(rig.tokens(2 * CHUNK))
        cache = new_cache(backend)
        backend.only, backend.gate = ("count_leading",), threading.Event()
        assert cache.ask(rig.tokens(2 * CHUNK)) is None
        cache.store(rig.tokens(CHUNK), flush=False)
        backend.gate.set()
        hit = cache.lookup(rig.tokens(2 * CHUNK), owner="r")
        assert hit.receipt.by_tier == {"l1": CHUNK, "t0": CHUNK}
        assert backend.calls.count("get_into") == 1
        cache.assert_idle()

    def test_an_owner_asks_once_until_it_is_forgotten(self, new_cache, backend):
        cache = new_cache(backend)
        for _ in range(3):
            while cache.ask(rig.tokens(CHUNK)) is None:
                cache.tiers.wait("r")
        assert backend.calls.count("count_leading") == 1
        cache.tiers.forget("r")
        assert cache.ask(rig.tokens(CHUNK)) is None
        cache.tiers.forget("r")
        cache.assert_idle()

    def test_an_owner_may_ask_for_more_later(self, new_cache, stored):
        """A preempted request comes back with the tokens it has generated."""
        cache = new_cache(stored(rig.tokens(CHUNK)))
        while (first := cache.ask(rig.tokens(CHUNK))) is None:
            cache.tiers.wait("r")
        cache.store(rig.tokens(2 * CHUNK))
        second = cache.ask(rig.tokens(2 * CHUNK))
        assert first.receipt.by_tier == {"l1": 0, "t0": CHUNK}
        assert second.receipt.by_tier == {"l1": 2 * CHUNK}, "it was read once"
        for hit in (first, second):
            cache.decider.release(hit.lease)
        cache.tiers.forget("r")
        cache.assert_idle()

    def test_many_at_once_want_the_same(self, new_cache, stored):
        cache = new_cache(stored(rig.tokens(6 * CHUNK)))
        answers = {f"o{i}": cache.ask(rig.tokens(6 * CHUNK), f"o{i}") for i in range(20)}
        for owner, answer in answers.items():
            hit = answer or cache.lookup(rig.tokens(6 * CHUNK), owner, release=False)
            assert hit.receipt.reason in (Reason.NONE, Reason.BEING_WRITTEN)
            cache.decider.release(hit.lease)
        assert cache.lookup(rig.tokens(6 * CHUNK)).tokens == 6 * CHUNK
        cache.assert_idle()

    def test_a_full_slab_makes_room(self, new_cache, stored):
        cache = new_cache(stored(rig.tokens(4 * CHUNK)), slots=4)
        cache.store(rig.tokens(4 * CHUNK, 1))
        assert cache.lookup(rig.tokens(4 * CHUNK)).tokens == 4 * CHUNK
        cache.assert_idle()

    def test_a_prefix_larger_than_the_slab_comes_back_in_part(self, new_cache, stored):
        cache = new_cache(stored(rig.tokens(6 * CHUNK)), slots=4)
        hit = cache.lookup(rig.tokens(6 * CHUNK))
        assert (hit.tokens, hit.receipt.reason) == (4 * CHUNK, Reason.NO_ROOM)
        cache.assert_idle()

    def test_a_slab_in_use_leaves_no_room(self, new_cache, stored):
        cache = new_cache(stored(rig.tokens(CHUNK)), slots=2)
        cache.store(rig.tokens(2 * CHUNK, 1))
        held = cache.lookup(rig.tokens(2 * CHUNK, 1), release=False)
        hit = cache.lookup(rig.tokens(CHUNK))
        assert (hit.tokens, hit.receipt.reason) == (0, Reason.NO_ROOM)
        cache.decider.release(held.lease)
        cache.assert_idle()

    def test_room_that_others_give_up_is_waited_for(self, new_cache, stored):
        cache = new_cache(stored(rig.tokens(2 * CHUNK)), slots=2)
        cache.store(rig.tokens(2 * CHUNK, 1))
        held = cache.lookup(rig.tokens(2 * CHUNK, 1), release=False)
        assert cache.ask(rig.tokens(2 * CHUNK)) is None
        time.sleep(0.05)
        cache.decider.release(held.lease)
        assert cache.lookup(rig.tokens(2 * CHUNK), "r").tokens == 2 * CHUNK
        cache.assert_idle()

    def test_two_that_hold_a_part_do_not_wait_for_each_other(self, new_cache, stored):
        """One gives up what it has not got, and the other gets all of it."""
        sequences = [rig.tokens(3 * CHUNK, seed) for seed in (1, 2)]
        backend = stored(*sequences)
        cache = new_cache(Slow(backend, 0.01), slots=4, depth=1)
        began = time.monotonic()
        for owner, sequence in enumerate(sequences):
            assert cache.ask(sequence, str(owner)) is None
        hits = {}
        while len(hits) < 2:
            for owner, sequence in enumerate(sequences):
                hit = None if owner in hits else cache.ask(sequence, str(owner))
                if hit:
                    hits[owner] = hit.tokens
                    cache.tiers.forget(str(owner))
                    cache.decider.release(hit.lease)
        assert max(hits.values()) == 3 * CHUNK
        assert time.monotonic() - began < 3, "nobody had to be told that time is up"
        cache.assert_idle()

    @pytest.mark.parametrize("depth", [1, 3])
    def test_so_many_are_read_at_a_time(self, new_cache, stored, depth):
        class Counting(Wrapper):
            now, most = 0, 0
            lock = threading.Lock()

            def get_into(self, key, out):
                with self.lock:
                    self.now += 1
                    self.most = max(self.most, self.now)
                time.sleep(0.02)
                with self.lock:
                    self.now -= 1
                return super().get_into(key, out)

        backend = Counting(stored(rig.tokens(8 * CHUNK)))
        cache = new_cache(backend, depth=depth)
        assert cache.lookup(rig.tokens(8 * CHUNK)).tokens == 8 * CHUNK
        assert backend.most == depth

    def test_who_wants_what_is_being_read_waits_for_that(self, new_cache, stored):
        backend = stored(rig.tokens(2 * CHUNK))
        cache = new_cache(Slow(backend, 0.05))
        assert cache.ask(rig.tokens(2 * CHUNK), "one") is None
        rig.wait_until(lambda: "get_into" in backend.calls)
        assert cache.lookup(rig.tokens(2 * CHUNK), "other").tokens == 2 * CHUNK
        assert cache.lookup(rig.tokens(2 * CHUNK), "one").tokens == 2 * CHUNK
        assert backend.calls.count("get_into") == 2
        cache.assert_idle()


class TestWindows:
    """An owner that loads a part while the next one is read."""

    def ask(self, cache, start, length=8):
        asking = Asking(start * CHUNK, in_windows=True)
        chain = rig.chain(rig.tokens(length * CHUNK))
        while (hit := cache.tiers.lookup("r", chain, GEOMETRY, length * CHUNK, asking)) is None:
            cache.tiers.wait("r")
        cache.tiers.forget("r")
        return hit

    def test_what_is_told_adds_up(self, new_cache, stored):
        cache = new_cache(stored(rig.tokens(8 * CHUNK)), slots=4)
        start, found = 0, []
        while start < 8:
            hit = self.ask(cache, start)
            assert hit.tokens == len(hit.slots) * CHUNK > 0
            assert [slot.chunk for slot in hit.slots] == list(range(start, start + len(hit.slots)))
            assert hit.receipt.asked == (8 - start) * CHUNK
            if start < 6:
                assert hit.more == (8 - start) * CHUNK - hit.tokens
            found += [cache.payload(slot) == expected(slot) for slot in hit.slots]
            start += len(hit.slots)
            cache.decider.release(hit.lease)
        assert found == [True] * 8
        counted = cache.counters
        assert (counted["lookups"], counted["lookup_tokens"]) == (1, 8 * CHUNK)
        assert counted["hit_tokens"] == 8 * CHUNK
        cache.assert_idle()

    @pytest.mark.parametrize("pages", [0, 2])
    def test_parts_end_where_chunks_do(self, new_cache, stored, pages):
        """Though the slab has a page of the next one; but for the last, which has no more."""
        tokens = rig.tokens(6 * CHUNK + pages * PAGE)
        cache = new_cache(stored(tokens), slots=4)
        start, chain = 0, rig.chain(tokens)
        while start < len(tokens):
            following = start + CHUNK
            cache.store(tokens[: min(following + PAGE, len(tokens))], start=following)
            asking = Asking(start, in_windows=True)
            while not (hit := cache.tiers.lookup("r", chain, GEOMETRY, len(tokens), asking)):
                cache.tiers.wait("r")
            cache.tiers.forget("r")
            end = start + hit.tokens
            assert end == len(tokens) or (hit.tokens and not end % CHUNK)
            assert start or (hit.tokens, hit.more) == (CHUNK, len(tokens) - CHUNK)
            assert sum(hit.receipt.by_tier.values()) == hit.tokens
            assert hit.receipt.bytes == hit.tokens // PAGE * rig.PAGE_BYTES
            cache.decider.release(hit.lease)
            start = end
        cache.assert_idle()

    def test_a_later_part_of_some_pages_is_none(self, new_cache):
        cache = new_cache(Backend(), slots=4)
        tokens = rig.tokens(2 * CHUNK)
        cache.store(tokens[: CHUNK + PAGE])
        hit = self.ask(cache, 1, 2)
        assert (hit.tokens, hit.slots, hit.lease, hit.more) == (0, [], None, 0)
        hit = self.ask(cache, 0, 2)
        assert (hit.tokens, hit.more) == (CHUNK + PAGE, 0)
        cache.decider.release(hit.lease)
        cache.assert_idle()

    def test_what_fits_comes_at_once(self, new_cache, stored):
        cache = new_cache(stored(rig.tokens(4 * CHUNK)), slots=8)
        hit = self.ask(cache, 0, 4)
        assert (hit.tokens, hit.more) == (4 * CHUNK, 0)
        cache.decider.release(hit.lease)

    def test_no_more_is_told_than_there_is(self, new_cache, stored):
        backend = stored(rig.tokens(8 * CHUNK))
        del backend.backend._objects[rig.chain(rig.tokens(8 * CHUNK)).key(5)]
        cache = new_cache(backend, slots=4)
        hit = self.ask(cache, 0)
        assert hit.tokens + hit.more == 5 * CHUNK
        cache.decider.release(hit.lease)

    def test_a_part_for_which_there_is_no_room_in_time(self, new_cache, stored):
        cache = new_cache(stored(rig.tokens(8 * CHUNK)), slots=2)
        first = self.ask(cache, 0)
        cache.store(rig.tokens(CHUNK, 1))
        other = cache.lookup(rig.tokens(CHUNK, 1), release=False)
        hit = self.ask(cache, 1)
        assert (hit.tokens, hit.more, hit.receipt.reason) == (0, 0, Reason.NO_ROOM)
        for one in (first, other):
            cache.decider.release(one.lease)
        cache.assert_idle()


class TestTails:
    def test_a_shorter_tail_is_better_than_none(self, new_cache, stored):
        cache = new_cache(stored(rig.tokens(2 * PAGE)))
        hit = cache.lookup(rig.tokens(4 * PAGE))
        assert (hit.tokens, hit.receipt.reason) == (2 * PAGE, Reason.NEVER_STORED)

    def test_the_longest_tail_is_taken(self, new_cache, stored):
        cache = new_cache(stored(rig.tokens(PAGE), rig.tokens(3 * PAGE), rig.tokens(2 * PAGE)))
        assert cache.lookup(rig.tokens(4 * PAGE)).tokens == 3 * PAGE

    def test_a_longer_tail_than_l1_has(self, new_cache, stored):
        backend = stored(rig.tokens(CHUNK + 3 * PAGE))
        cache = new_cache(backend)
        cache.store(rig.tokens(CHUNK + PAGE), flush=False)
        hit = cache.lookup(rig.tokens(2 * CHUNK))
        assert hit.tokens == CHUNK + 3 * PAGE
        assert hit.receipt.by_tier == {"l1": CHUNK, "t0": 3 * PAGE}
        cache.assert_idle()

    def test_no_tail_that_l1_has_already(self, new_cache, stored):
        backend = stored(rig.tokens(2 * PAGE))
        cache = new_cache(backend)
        cache.store(rig.tokens(2 * PAGE))
        backend.calls.clear()
        assert cache.lookup(rig.tokens(3 * PAGE)).receipt.by_tier == {"l1": 2 * PAGE}
        assert backend.calls == ["count_leading"]

    def test_a_tail_after_whole_chunks(self, new_cache, stored):
        """The next turn of a conversation, after a restart."""
        cache = new_cache(stored(rig.tokens(2 * CHUNK + 2 * PAGE)))
        hit = cache.lookup(rig.tokens(4 * CHUNK))
        assert hit.receipt.by_tier == {"l1": 0, "t0": 2 * CHUNK + 2 * PAGE}
        assert hit.receipt.reason is Reason.NEVER_STORED
        cache.assert_idle()

    def test_the_exact_tail(self, new_cache, stored):
        cache = new_cache(stored(rig.tokens(2 * CHUNK + PAGE)))
        hit = cache.lookup(rig.tokens(2 * CHUNK + PAGE + PAGE - 1))
        assert (hit.tokens, hit.receipt.reason) == (2 * CHUNK + PAGE, Reason.NONE)


class TestOrder:
    def test_the_first_tier_that_has_all_is_the_only_one_asked(self, new_cache, stored):
        one, other = Backend(), Backend()
        stored(rig.tokens(2 * CHUNK), into=one)
        stored(rig.tokens(2 * CHUNK), into=other)
        hit = new_cache(one, other).lookup(rig.tokens(2 * CHUNK))
        assert hit.receipt.by_tier == {"l1": 0, "t0": 2 * CHUNK}
        assert other.calls == []

    def test_the_tier_that_has_most(self, new_cache, stored):
        one, other = Backend(), Backend()
        stored(rig.tokens(CHUNK), into=one)
        stored(rig.tokens(3 * CHUNK), into=other)
        hit = new_cache(one, other).lookup(rig.tokens(4 * CHUNK))
        assert hit.receipt.by_tier == {"l1": 0, "t1": 3 * CHUNK}

    def test_tiers_complete_each_other(self, new_cache, stored):
        one, other = Backend(), Backend()
        chain = rig.chain(rig.tokens(4 * CHUNK))
        for backend, missing in ((one, [2]), (other, [0, 1])):
            stored(rig.tokens(4 * CHUNK + PAGE), into=backend)
            for chunk in missing:
                assert backend.remove(chain.key(chunk))
        one.remove(chain.key(3))
        one.calls.clear()
        hit = new_cache(one, other).lookup(rig.tokens(5 * CHUNK))
        assert hit.receipt.by_tier == {"l1": 0, "t0": 2 * CHUNK + PAGE, "t1": 2 * CHUNK}

    def test_a_failing_tier_is_named_as_the_reason(self, new_cache):
        one, other = Backend(), Backend()
        one.error = on_purpose
        hit = new_cache(one, other).lookup(rig.tokens(CHUNK))
        assert (hit.tokens, hit.receipt.reason) == (0, Reason.TIER_FAILED)

    def test_a_tier_that_fails_to_read_what_it_has(self, new_cache, stored):
        backend = stored(rig.tokens(CHUNK))
        backend.error, backend.only = on_purpose, ("get_into",)
        hit = new_cache(backend).lookup(rig.tokens(CHUNK))
        assert (hit.tokens, hit.receipt.reason) == (0, Reason.TIER_FAILED)

    def test_a_failing_tier_is_passed_over(self, new_cache, stored):
        one, other = Backend(), Backend()
        one.error, one.only = on_purpose, ("count_leading",)
        stored(rig.tokens(CHUNK), into=other)
        cache = new_cache(one, other)
        assert cache.lookup(rig.tokens(CHUNK)).receipt.by_tier == {"l1": 0, "t1": CHUNK}
        assert cache.counters.values["tier_errors", "t0"] == 1


class TestDamage:
    def test_a_damaged_object_is_a_miss_a_counter_and_gone(
        self, new_cache, stored, caplog, monkeypatch
    ):
        monkeypatch.setattr(logging.getLogger("lmcache"), "propagate", True)
        backend = stored(rig.tokens(2 * CHUNK))
        cache = new_cache(Corrupting(backend, every=2))
        hit = cache.lookup(rig.tokens(2 * CHUNK))
        assert (hit.tokens, hit.receipt.reason) == (CHUNK, Reason.DAMAGED)
        assert cache.counters.values["damaged", "t0"] == 1
        key = rig.chain(rig.tokens(2 * CHUNK)).key(1).hex()
        assert f"tier t0 held a damaged object: {key}" in caplog.text
        assert len(backend.held()) == 1
        assert backend.calls.count("discard_damaged") == 1
        assert cache.lookup(rig.tokens(2 * CHUNK)).receipt.reason is Reason.NEVER_STORED
        cache.assert_idle()

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda data: data[:-1],
            lambda data: data[:HEADER_BYTES],
            lambda data: b"",
            lambda data: bytes(len(data)),
            lambda data: data[:100] + b"\1" + data[101:],
            lambda data: b"X" + data[1:],
        ],
        ids=["a byte short", "a header", "nothing", "zeros", "spare field", "magic"],
    )
    def test_what_is_not_the_object_is_a_miss(self, new_cache, stored, spoil):
        backend = stored(rig.tokens(CHUNK))
        [(key, data)] = backend.held().items()
        backend.backend.put(key, memoryview(spoil(data)))
        cache = new_cache(backend)
        hit = cache.lookup(rig.tokens(CHUNK))
        assert (hit.tokens, hit.receipt.reason) == (0, Reason.DAMAGED)
        assert backend.held() == {}
        cache.assert_idle()

    def test_an_intact_object_under_the_wrong_key_is_a_miss(self, new_cache, stored):
        """A store that mixes up two keys returns bytes whose checksum is right."""
        backend = stored(rig.tokens(CHUNK), rig.tokens(CHUNK, 1))
        one, other = backend.held()
        backend.backend.put(one, memoryview(backend.held()[other]))
        cache = new_cache(backend)
        assert cache.lookup(rig.tokens(CHUNK)).receipt.reason is Reason.DAMAGED
        assert cache.lookup(rig.tokens(CHUNK, 1)).tokens == CHUNK

    def test_an_object_too_large_is_not_read_beyond_its_slot(self, new_cache, stored):
        backend = stored(rig.tokens(2 * PAGE), rig.tokens(CHUNK))
        chain = rig.chain(rig.tokens(CHUNK))
        backend.backend.put(chain.tail(0, 2), memoryview(backend.held()[chain.key(0)]))
        cache = new_cache(backend)
        cache.store(rig.tokens(CHUNK, 1), flush=False)
        assert cache.lookup(rig.tokens(2 * PAGE)).tokens == 0
        assert cache.lookup(rig.tokens(CHUNK, 1)).tokens == CHUNK, "what lay beside it is intact"

    def test_a_store_that_cannot_remove_is_not_asked_to(self, new_cache, stored):
        backend = stored(rig.tokens(CHUNK))
        backend.capabilities = Capabilities(removal=False)
        cache = new_cache(Corrupting(backend, every=1))
        assert cache.lookup(rig.tokens(CHUNK)).receipt.reason is Reason.DAMAGED
        assert "discard_damaged" not in backend.calls

    def test_an_object_that_vanishes_is_a_miss(self, new_cache, stored):
        backend = stored(rig.tokens(2 * CHUNK))
        backend.backend.remove(rig.chain(rig.tokens(CHUNK)).key(0))
        backend.count_leading = len
        cache = new_cache(backend)
        hit = cache.lookup(rig.tokens(2 * CHUNK))
        assert (hit.tokens, hit.receipt.reason) == (0, Reason.NEVER_STORED)
        cache.assert_idle()


class TestErrors:
    """Whatever a backend raises, where the contract allows it and where it does not."""

    @pytest.mark.parametrize("call", ["count_leading", "contains", "get_into"])
    @pytest.mark.parametrize("error", [on_purpose, disk_full, ValueError, KeyError, MemoryError])
    def test_it_is_a_miss_and_leaks_nothing(self, new_cache, stored, call, error):
        backend = stored(rig.tokens(2 * CHUNK), rig.tokens(PAGE, 1))
        backend.error, backend.only = error, (call,)
        cache = new_cache(backend)
        for sequence in (rig.tokens(2 * CHUNK), rig.tokens(3 * PAGE, 1)):
            began = time.monotonic()
            cache.lookup(sequence)
            assert time.monotonic() - began < 4, "the waiter was not told"
        assert cache.counters["tier_errors"] >= 1
        cache.assert_idle()
        backend.error = None
        assert cache.lookup(rig.tokens(2 * CHUNK)).tokens == 2 * CHUNK, "its keys are free again"

    def test_removing_a_damaged_object_may_fail(self, new_cache, stored):
        backend = stored(rig.tokens(CHUNK))
        backend.error, backend.only = on_purpose, ("discard_damaged",)
        cache = new_cache(Corrupting(backend, every=1))
        assert cache.lookup(rig.tokens(CHUNK)).receipt.reason is Reason.DAMAGED
        cache.assert_idle()

    @pytest.mark.parametrize("every", [2, 3, 5])
    def test_a_flaky_backend(self, new_cache, every, monkeypatch):
        monkeypatch.setattr(tier_module, "REST_S", 0.0)
        backend = Flaky(Backend(), every=every)
        cache = new_cache(backend, slots=6)
        for turn in range(60):
            cache.store(rig.tokens(2 * CHUNK, turn % 7))
            cache.lookup(rig.tokens(3 * CHUNK, turn % 7))
        assert cache.counters["tier_errors"] == backend.failures
        cache.assert_idle()

    @pytest.mark.parametrize("count", [99, -1, None, "many"])
    def test_a_count_that_makes_no_sense(self, new_cache, stored, count):
        backend = stored(rig.tokens(2 * CHUNK))
        backend.count_leading = lambda keys: count
        cache = new_cache(backend)
        assert cache.lookup(rig.tokens(3 * CHUNK)).tokens in (0, 2 * CHUNK)
        cache.assert_idle()

    @pytest.mark.parametrize("size", [-1, 0, 10**9, "all", 1.5, True])
    def test_a_length_that_makes_no_sense(self, new_cache, stored, size):
        backend = stored(rig.tokens(CHUNK))
        backend.get_into = lambda key, out: size
        cache = new_cache(backend)
        assert cache.lookup(rig.tokens(CHUNK)).tokens == 0
        cache.assert_idle()

    def test_tokens_without_a_key_leave_no_lease(self, new_cache, stored):
        """The first chunk hits; the key of the third cannot be computed."""
        cache = new_cache(stored(rig.tokens(CHUNK)))
        cache.store(rig.tokens(CHUNK))
        with pytest.raises(OverflowError):
            cache.ask([*rig.tokens(2 * CHUNK), *[2**32] * CHUNK])
        cache.assert_idle()


class TestTime:
    def test_a_late_answer_is_what_l1_has(self, new_cache, stored):
        backend = stored(rig.tokens(3 * CHUNK))
        cache = new_cache(backend, fetch_timeout_s=0.05)
        cache.store(rig.tokens(CHUNK))
        backend.gate.clear()
        hit = cache.lookup(rig.tokens(3 * CHUNK))
        assert (hit.tokens, hit.receipt.reason) == (CHUNK, Reason.TIMED_OUT)
        assert hit.receipt.by_tier == {"l1": CHUNK}
        assert len(cache.decider.leases) == 0
        backend.gate.set()
        cache.tiers.close()
        cache.assert_idle()

    def test_what_arrives_late_serves_the_next(self, new_cache, stored):
        backend = stored(rig.tokens(CHUNK))
        cache = new_cache(backend, fetch_timeout_s=0.05)
        backend.only, backend.gate = ("get_into",), threading.Event()
        assert cache.lookup(rig.tokens(CHUNK)).receipt.reason is Reason.TIMED_OUT
        assert cache.lookup(rig.tokens(CHUNK)).receipt.reason is Reason.TIMED_OUT, "the same read"
        assert cache.decider.free_bytes < cache.decider.capacity_bytes, "the backend writes to it"
        backend.gate.set()
        rig.wait_until(lambda: len(cache.decider) == 1)
        assert cache.lookup(rig.tokens(CHUNK)).receipt.by_tier == {"l1": CHUNK}
        cache.assert_idle()

    def test_an_owner_that_is_gone_leaks_nothing(self, new_cache, stored):
        backend = stored(rig.tokens(4 * CHUNK))
        for call in ("count_leading", "get_into"):
            cache = new_cache(backend)
            cache.store(rig.tokens(CHUNK))
            backend.only, backend.gate = (call,), threading.Event()
            assert cache.ask(rig.tokens(4 * CHUNK)) is None
            rig.wait_until(lambda call=call: call in backend.calls)
            cache.tiers.forget("r")
            cache.tiers.forget("r")
            assert len(cache.decider.leases) == 0
            before = backend.calls.count("get_into")
            backend.gate.set()
            cache.tiers.close()
            assert backend.calls.count("get_into") <= before + 4, "it went on for nobody"
            cache.assert_idle()
            backend.calls.clear()

    def test_leases_held_for_a_waiter_end_with_it(self, new_cache, stored):
        cache = new_cache(stored(rig.tokens(3 * CHUNK)))
        cache.store(rig.tokens(CHUNK))
        assert cache.ask(rig.tokens(3 * CHUNK)) is None
        cache.tiers.wait("r")
        assert len(cache.decider.leases) == 3
        cache.tiers.forget("r")
        assert len(cache.decider.leases) == 0

    def test_what_was_found_cannot_be_evicted_before_it_is_collected(self, new_cache, stored):
        cache = new_cache(stored(rig.tokens(2 * CHUNK)), slots=3)
        assert cache.ask(rig.tokens(2 * CHUNK)) is None
        cache.tiers.wait("r")
        for seed in range(1, 6):
            cache.store(rig.tokens(CHUNK, seed))
        assert cache.lookup(rig.tokens(2 * CHUNK), owner="r").tokens == 2 * CHUNK
        cache.assert_idle()

    def test_waiting_for_nobody(self, new_cache, backend):
        cache = new_cache(backend)
        cache.tiers.wait("nobody")
        cache.tiers.forget("nobody")


class TestSleeping:
    @pytest.fixture(autouse=True)
    def short(self, monkeypatch):
        monkeypatch.setattr(tier_module, "REST_S", 0.2)

    def test_a_tier_that_fails_rests(self, new_cache, stored):
        backend = stored(rig.tokens(CHUNK))
        backend.error = on_purpose
        cache = new_cache(backend)
        for seed in range(10):
            cache.lookup(rig.tokens(CHUNK, seed))
        assert len(backend.calls) == tier_module.TRIES
        cache.store(rig.tokens(CHUNK, 11))
        assert len(backend.calls) == tier_module.TRIES, "it is not written to either"
        assert cache.counters["tier_dropped"] == 1

    def test_a_tier_that_rests_delays_nobody(self, new_cache, backend):
        backend.error = on_purpose
        cache = new_cache(backend)
        for seed in range(3):
            cache.lookup(rig.tokens(CHUNK, seed))
        assert cache.ask(rig.tokens(CHUNK, 4)) is not None, "not even for one turn"

    def test_a_tier_that_has_rested_works_again(self, new_cache, stored):
        backend = stored(rig.tokens(CHUNK))
        backend.error = on_purpose
        cache = new_cache(backend)
        for seed in range(1, 4):
            cache.lookup(rig.tokens(CHUNK, seed))
        backend.error = None
        assert cache.lookup(rig.tokens(CHUNK)).tokens == 0
        time.sleep(0.25)
        assert cache.lookup(rig.tokens(CHUNK)).tokens == CHUNK

    def test_failures_in_between_do_not_add_up(self, new_cache, backend):
        cache = new_cache(backend)
        for seed in range(8):
            backend.error = on_purpose if seed % 2 else None
            cache.lookup(rig.tokens(PAGE, seed))  # of which there can be no shorter tail
        assert backend.calls.count("count_leading") == 8

    def test_a_tier_that_hangs_rests_too(self, new_cache, backend, monkeypatch):
        """Or every request for ever would wait for as long as one may."""
        monkeypatch.setattr(tier_module, "REST_S", 60.0)
        cache = new_cache(backend, fetch_timeout_s=0.05)
        backend.gate.clear()
        for seed in range(3):
            assert cache.lookup(rig.tokens(CHUNK, seed)).receipt.reason is Reason.TIMED_OUT
        hit = cache.ask(rig.tokens(CHUNK, 4))
        assert hit is not None
        assert hit.receipt.reason is Reason.TIER_FAILED
        backend.gate.set()

    def test_a_tier_that_takes_all_threads_does_not_delay_for_ever(self, new_cache, monkeypatch):
        """The other tier is well, but there is no thread left to ask it."""
        monkeypatch.setattr(tier_module, "REST_S", 60.0)
        stuck, healthy = Backend(), Backend()
        cache = new_cache(stuck, healthy, fetches=1, fetch_timeout_s=0.05)
        stuck.gate.clear()
        for seed in range(4):
            cache.lookup(rig.tokens(CHUNK, seed))
        assert cache.ask(rig.tokens(CHUNK, 5)) is not None
        stuck.gate.set()

    def test_a_slow_tier_that_answers_in_time_does_not_rest(self, new_cache):
        backend = Slow(Backend(), 0.02)
        cache = new_cache(backend)
        for seed in range(5):
            cache.store(rig.tokens(CHUNK, seed))
            cache.decider.clear()
            assert cache.lookup(rig.tokens(CHUNK, seed)).tokens == CHUNK

    def test_reads_do_not_wait_behind_writes(self, new_cache, stored):
        backend = stored(rig.tokens(CHUNK))
        cache = new_cache(backend, fetch_timeout_s=5.0, depth=1)
        backend.only, backend.gate = ("put",), threading.Event()
        cache.store(rig.tokens(4 * CHUNK, 1), flush=False)
        assert cache.lookup(rig.tokens(CHUNK)).tokens == CHUNK
        backend.gate.set()


class TestReasons:
    def test_what_was_evicted_and_is_nowhere_else_is_evicted(self, new_cache, backend):
        backend.put = lambda key, data: False
        cache = new_cache(backend, slots=2)
        cache.store(rig.tokens(CHUNK))
        cache.store(rig.tokens(2 * CHUNK, 1))
        assert cache.lookup(rig.tokens(CHUNK)).receipt.reason is Reason.EVICTED

    def test_what_is_nowhere_was_never_stored(self, new_cache, backend):
        assert new_cache(backend).lookup(rig.tokens(CHUNK)).receipt.reason is Reason.NEVER_STORED

    def test_every_lookup_is_counted_once_with_its_reason(self, new_cache, stored):
        cache = new_cache(stored(rig.tokens(2 * CHUNK)))
        for sequence in (rig.tokens(2 * CHUNK), rig.tokens(PAGE - 1), rig.tokens(CHUNK, 1)):
            cache.lookup(sequence)
        counts = cache.counters.copy()
        assert cache.counters["lookups"] == 3
        assert {label for name, label in counts if name == "lookups"} == {
            "none",
            "short",
            "never_stored",
        }
        assert cache.counters["lookup_tokens"] == 3 * CHUNK + PAGE - 1
        assert counts["hit_tokens", "t0"] == 2 * CHUNK


class TestClosing:
    def test_what_is_queued_is_written_first(self, new_cache):
        backend = Backend()
        cache = new_cache(Slow(backend, 0.01), depth=1, slots=16)
        cache.store(rig.tokens(8 * CHUNK), flush=False)
        cache.tiers.close()
        assert len(backend.held()) == 8
        assert backend.closed == 1
        cache.assert_idle()

    def test_a_backend_that_hangs_does_not_keep_the_engine_from_closing(self, new_cache, backend):
        cache = new_cache(backend, depth=1)
        backend.gate.clear()
        cache.store(rig.tokens(8 * CHUNK), flush=False)
        cache.ask(rig.tokens(CHUNK, 1))
        began = time.monotonic()
        cache.tiers.close(timeout_s=0.1)
        assert time.monotonic() - began < 3
        assert backend.closed == 1
        backend.gate.set()
        rig.wait_until(lambda: not cache.tiers._writes._tiers[0].writes)
        cache.assert_idle()

    def test_the_end_of_the_process_finishes_the_writes(self, tmp_path):
        script = f"""
import sys
sys.path[:0] = [{str(Path(rig.__file__).parent)!r}]
import rig
from lmcache.core.tier import Tier
from lmcache.core.tiers import Tiers
from lmcache.core.write_policy import WritePolicy
from lmcache.plugins.manager import PluginManager
from lmcache.testing.faults import Slow

decider, geometry = rig.decider(8), rig.geometry()
backend = PluginManager().open_backend("file://{tmp_path}?max_size=100MB")
tiers = Tiers(decider, [Tier("file", Slow(backend, 0.05), 1)])
chain = rig.chain(rig.tokens(5 * rig.CHUNK_TOKENS))
slots, _ = decider.reserve(chain, geometry, 0, 5 * rig.CHUNK_TOKENS, tail=True)
for slot in slots:
    decider.commit(slot, geometry)
"""
        subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
        keys = [rig.chain(rig.tokens(5 * CHUNK)).key(chunk) for chunk in range(5)]
        with PluginManager().open_backend(f"file://{tmp_path}?max_size=100MB") as backend:
            assert backend.count_leading(keys) == 5

    def test_who_waits_is_told(self, new_cache, backend):
        cache = new_cache(backend, fetch_timeout_s=30.0, depth=1)
        backend.gate.clear()
        for owner in ("running", "queued"):
            assert cache.ask(rig.tokens(CHUNK), owner) is None
        waiters = [
            threading.Thread(target=cache.tiers.wait, args=(owner,))
            for owner in ("running", "queued")
        ]
        for waiter in waiters:
            waiter.start()
        cache.tiers.close(timeout_s=0.05)
        for waiter in waiters:
            waiter.join(3)
            assert not waiter.is_alive()
        backend.gate.set()

    def test_afterwards_l1_still_serves(self, new_cache, backend):
        """Another thread detaches while the scheduler is in the middle of a step."""
        cache = new_cache(backend)
        cache.store(rig.tokens(CHUNK))
        cache.tiers.close()
        cache.tiers.close()
        assert cache.store(rig.tokens(CHUNK, 1)) is Reason.NONE
        assert cache.lookup(rig.tokens(CHUNK, 1)).tokens == CHUNK
        assert cache.lookup(rig.tokens(CHUNK, 2)).receipt.reason is Reason.NEVER_STORED
        cache.assert_idle()

    def test_a_chunk_offered_while_closing_is_dropped(self, new_cache, backend):
        cache = new_cache(backend)
        offer = cache.decider.listeners.on_commit
        cache.tiers.close()
        cache.decider.listeners.on_commit = offer  # as if it had been read just before
        cache.store(rig.tokens(CHUNK))
        assert cache.counters["tier_dropped"] == 1
        cache.assert_idle()

    def test_one_backend_that_cannot_close_keeps_no_other_open(self, new_cache):
        one, other = Backend(), Backend()

        def fail():
            raise BackendError("on purpose")

        cache = new_cache(one, other)
        close, one.close = one.close, fail
        with pytest.raises(BackendError, match="on purpose"):
            cache.tiers.close()
        assert other.closed == 1
        one.close = close

    def test_no_thread_is_left(self, new_cache, backend):
        cache = new_cache(backend)
        cache.store(rig.tokens(4 * CHUNK))
        cache.lookup(rig.tokens(CHUNK, 1))
        cache.tiers.close()
        ours = ("lmcache-tier", "lmcache-read", "lmcache-write")
        assert not [t for t in threading.enumerate() if t.name.startswith(ours)]


def test_no_tiers_at_all(new_cache):
    cache = new_cache()
    cache.store(rig.tokens(CHUNK))
    assert cache.ask(rig.tokens(2 * CHUNK)).tokens == CHUNK
