"""The decider under any order of calls: nothing in use moves, nothing leaks, no byte too many."""

from __future__ import annotations

import random
import threading
from itertools import pairwise

import pytest
import rig
from blake3 import blake3
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmcache.core.eviction.arc import ARCPolicy
from lmcache.core.eviction.lru import LRUPolicy
from lmcache.core.eviction.s3fifo import S3FIFOPolicy
from lmcache.core.flights import Flights
from lmcache.core.geometry import Geometry
from lmcache.core.index import ABSENT
from lmcache.core.objects import HEADER_BYTES
from lmcache.core.receipts import Reason
from lmcache.core.slab import CONTROL_BYTES, Slab

PAGE, CHUNK, PAGES = rig.PAGE_TOKENS, rig.CHUNK_TOKENS, rig.PAGES_PER_CHUNK
LEASE_S = 10.0

sequences = st.builds(
    lambda chunks, rest: [c for c in chunks for _ in range(CHUNK)] + [9] * rest,
    st.lists(st.integers(0, 1), max_size=3),
    st.integers(0, CHUNK - 1),
)


class AnyOrder(RuleBasedStateMachine):
    """Every call in any order, by requests that hold what they were given for as long as they like.

    Slots are filled with what follows from their key, or from their generation while they are being
    written, so that two slots that overlap, or one that is given away too early, are seen.
    """

    def __init__(self):
        super().__init__()
        self.made = None

    @initialize(
        slots=st.integers(1, 9),
        page_bytes=st.sampled_from([192, 2048]),
        policy=st.sampled_from([LRUPolicy, S3FIFOPolicy, ARCPolicy]),
        keep=st.booleans(),
    )
    def create(self, slots, page_bytes, policy, keep):
        self.clock = rig.Clock()
        self.keep = keep
        self.geometry = Geometry(PAGE, PAGES, (page_bytes,), bytes(32))
        self.made = rig.decider(
            slots, policy=policy(), keep=keep, lease_s=LEASE_S, clock=self.clock
        )
        self.made.listeners.on_commit = self.offered
        self.flights = Flights(self.made, self.geometry, [0])
        self.reserved = []
        self.complete = {}
        self.evicted = set()
        self.hits = []
        self.air = []
        self.writes = []
        self.generations = set()

    # ---- what the slots hold

    def payload(self, slot):
        start = slot.offset + HEADER_BYTES
        return self.made.slab.view[start : slot.offset + slot.size]

    def fill(self, slot, seed):
        view = self.payload(slot)
        view[:] = blake3(seed).digest(length=len(view))

    def holds(self, slot, seed):
        view = self.payload(slot)
        return view == blake3(seed).digest(length=len(view))

    @staticmethod
    def draft(slot):
        return slot.generation.to_bytes(8, "little")

    def note(self, *, evicting):
        """Take note of what has left the index."""
        gone = [key for key in self.complete if key not in self.made]
        for key in gone:
            del self.complete[key]
            if evicting:
                self.evicted.add(key)

    def offered(self, slot):
        if self.offer:
            self.writes.append(self.made.pin(slot.key))

    def rounded(self, size):
        return -(-size // 4096) * 4096

    # ---- the calls

    @rule(sequence=sequences, start=st.integers(0, 2 * CHUNK), tail=st.booleans())
    def reserve(self, sequence, start, tail):
        chain = rig.chain(sequence)
        known = set(self.complete) | {slot.key for slot in self.reserved}
        stop = len(sequence)
        slots, reason = self.made.reserve(chain, self.geometry, start, stop, tail=tail)
        self.note(evicting=True)
        self.reserved += slots
        wanted = [
            (chunk, pages)
            for chunk in range(start // CHUNK, 4)
            if (pages := chain.pages_in(chunk, stop)) and (tail or pages == PAGES)
        ]
        missing = [(c, p) for c, p in wanted if chain.part(c, p) not in known]
        given = [(slot.chunk, self.geometry.pages_of(slot)) for slot in slots]
        if reason is Reason.NONE:
            # what was known may have been evicted by the first of them, but only that
            assert set(missing) <= set(given) <= set(wanted)
        else:
            assert reason is Reason.NO_ROOM
            assert given == [part for part in wanted if part in given]
            left = wanted[wanted.index(given[-1]) + 1 :] if given else wanted
            known = set(self.complete) | {slot.key for slot in self.reserved}
            pages = max(p for c, p in left if chain.part(c, p) not in known)
            assert self.largest_gap() < self.geometry.slot_bytes(pages), "there was room"
        for slot in slots:
            assert slot.generation not in self.generations
            self.generations.add(slot.generation)
            assert slot.key == chain.part(slot.chunk, self.geometry.pages_of(slot))
            assert CONTROL_BYTES <= slot.offset <= self.made.slab.size - slot.size
            self.fill(slot, self.draft(slot))

    def largest_gap(self):
        """The most that could be made free in one piece: only what is in use must stay."""
        held = {slot for lease in self.made.leases for slot in self.slots_of(lease)}
        held |= {slot for slot in self.complete.values() if self.is_pinned(slot)}
        taken = sorted((s.offset, s.offset + self.rounded(s.size)) for s in [*self.reserved, *held])
        end = CONTROL_BYTES + self.made.capacity_bytes
        edges = [(0, CONTROL_BYTES), *taken, (end, end)]
        return max(start - stop for (_, stop), (start, _) in pairwise(edges))

    def is_pinned(self, slot):
        return self.made.find(slot.key) in self.writes

    def slots_of(self, lease):
        by_entry = {self.made.find(key): slot for key, slot in self.complete.items()}
        return [by_entry[entry] for entry in lease.entries]

    @precondition(lambda self: self.made and self.reserved)
    @rule(data=st.data(), offer=st.booleans())
    def commit(self, data, offer):
        slot = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        self.fill(slot, slot.key)
        self.made.slab.write_word(slot.offset + self.geometry.tag_offset(0), slot.generation)
        self.offer = offer
        entry = self.made.commit(slot, self.geometry)
        if self.keep or offer:
            assert self.made.find(slot.key) == entry
            self.complete[slot.key] = slot
        else:
            assert slot.key not in self.made, "nobody wants it, and it is not to be kept"
        self.evicted.discard(slot.key)

    @precondition(lambda self: self.made and self.reserved)
    @rule(data=st.data())
    def abandon(self, data):
        slot = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        self.made.abandon(slot)
        assert slot.key not in self.made

    @precondition(lambda self: self.made and self.writes)
    @rule()
    def written(self):
        self.made.unpin(self.writes.pop(0))
        self.note(evicting=False)

    @rule(sequence=sequences)
    def lookup(self, sequence):
        chain, stop = rig.chain(sequence), len(sequence)
        late = [h for h in self.hits if h.lease and h.lease.deadline <= self.clock.now]
        hit = self.made.lookup("someone", chain, self.geometry, stop)
        for other in late:
            assert other.lease not in self.made.leases
        self.note(evicting=False)
        expected, reason = [], Reason.SHORT
        for chunk in range(4):
            pages = chain.pages_in(chunk, stop)
            if not pages:
                break
            key, reason = chain.part(chunk, pages), Reason.NONE
            if key not in self.complete:
                reason = Reason.EVICTED if key in self.evicted else Reason.NEVER_STORED
                if any(slot.key == key for slot in self.reserved):
                    reason = Reason.BEING_WRITTEN
                shorter = (chain.tail(chunk, n) for n in range(pages - 1, 0, -1))
                expected += [k for k in shorter if k in self.complete][:1]
                break
            expected.append(key)
        assert [slot.key for slot in hit.slots] == expected
        assert hit.receipt.reason is reason
        assert hit.receipt.asked == stop
        assert hit.tokens == self.geometry.tokens_in(hit.slots) <= stop
        assert hit.receipt.by_tier == {"l1": hit.tokens}
        assert [slot.chunk for slot in hit.slots] == list(range(len(hit.slots)))
        assert (hit.lease is None) is (not hit.slots)
        for slot in hit.slots:
            assert self.holds(slot, slot.key), "a hit on something else"
        if hit.lease:
            self.hits.append(hit)

    @precondition(lambda self: self.made and self.hits)
    @rule(data=st.data(), again=st.booleans())
    def release(self, data, again):
        hit = self.hits.pop(data.draw(st.integers(0, len(self.hits) - 1)))
        self.made.release(hit.lease)
        if again:
            self.made.release(hit.lease)
        self.note(evicting=False)

    @precondition(lambda self: self.made and self.hits)
    @rule(data=st.data())
    def take_off(self, data):
        """Hand a hit to a mover. Its lease may have run out by then."""
        hit = self.hits.pop(data.draw(st.integers(0, len(self.hits) - 1)))
        if hit.lease in self.made.leases:
            self.air.append((self.flights.depart([], [hit.lease], hit.slots), hit))

    @precondition(lambda self: self.made and self.air)
    @rule(data=st.data())
    def land(self, data):
        number, _ = self.air.pop(data.draw(st.integers(0, len(self.air) - 1)))
        self.flights.land(number)
        self.note(evicting=False)

    @rule(seconds=st.floats(0, 1.5 * LEASE_S))
    def time_passes(self, seconds):
        self.clock.now += seconds

    @rule()
    def clear(self):
        self.made.clear()
        self.note(evicting=False)
        leased = {e for lease in self.made.leases for e in lease.entries}
        assert {self.made.find(key) for key in self.complete} == leased | set(self.writes)

    @precondition(lambda self: self.made and self.complete)
    @rule(data=st.data(), off=st.integers(0, 1))
    def discard(self, data, off):
        slot = data.draw(st.sampled_from(sorted(self.complete.values())))
        entry = self.made.find(slot.key)
        in_use = entry in self.writes or any(entry in lease.entries for lease in self.made.leases)
        self.made.discard(slot.key, slot.generation + off)
        assert (slot.key in self.made) is bool(in_use or off)
        self.note(evicting=False)

    # ---- what must hold at every instant

    @invariant()
    def nothing_in_use_has_changed(self):
        if not self.made:
            return
        for slot in self.reserved:
            assert self.holds(slot, self.draft(slot)), "two hold the same memory"
        for hit in [*self.hits, *(hit for _, hit in self.air)]:
            if hit.lease in self.made.leases:
                for slot in hit.slots:
                    assert slot.key in self.made, "a leased chunk is gone"
                    assert self.holds(slot, slot.key), "a leased chunk was overwritten"

    @invariant()
    def leases_last(self):
        if not self.made:
            return
        for hit in self.hits:
            assert hit.lease in self.made.leases or hit.lease.deadline <= self.clock.now
        for _, hit in self.air:
            assert hit.lease in self.made.leases, "a lease ended while a mover held it"

    @invariant()
    def the_sums_are_right(self):
        if not self.made:
            return
        live = [*self.reserved, *self.complete.values()]
        taken = sorted((s.offset, s.offset + self.rounded(s.size)) for s in live)
        assert all(end <= start for (_, end), (start, _) in pairwise(taken))
        used = sum(end - start for start, end in taken)
        assert self.made.free_bytes == self.made.capacity_bytes - used
        assert len(self.made) == len(self.complete)
        gauges = self.made.gauges()
        assert gauges["free_bytes"] == self.made.free_bytes
        assert gauges["leases"] == len(self.made.leases)

    def teardown(self):
        if not self.made:
            return
        for hit in self.hits:
            self.made.release(hit.lease)
        self.flights.ground()
        for slot in self.reserved:
            self.made.abandon(slot)
        for entry in self.writes:
            self.made.unpin(entry)
        if not self.keep:
            assert len(self.made) == 0
        rig.assert_idle(self.made)
        self.made.slab.close()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# --- one thing at a time


GEOMETRY = rig.geometry()


@pytest.fixture
def made(workshop):
    return workshop.decider(4, clock=rig.Clock(), lease_s=LEASE_S)


def reserve(made, sequence, *, start=0, tail=True):
    chain = rig.chain(sequence)
    return made.reserve(chain, GEOMETRY, start, len(sequence), tail=tail)


def store(made, sequence, *, tail=True):
    slots, reason = reserve(made, sequence, tail=tail)
    for slot in slots:
        made.commit(slot, GEOMETRY)
    return reason


def lookup(made, sequence, stop=None):
    chain = rig.chain(sequence)
    return made.lookup("r", chain, GEOMETRY, len(sequence) if stop is None else stop)


class TestReasons:
    def test_none(self, made):
        store(made, rig.tokens(CHUNK))
        hit = lookup(made, rig.tokens(CHUNK))
        assert (hit.tokens, hit.receipt.reason) == (CHUNK, Reason.NONE)

    def test_none_up_to_the_last_whole_page(self, made):
        store(made, rig.tokens(CHUNK + PAGE))
        hit = lookup(made, rig.tokens(CHUNK + 2 * PAGE - 1))
        assert (hit.tokens, hit.receipt.reason) == (CHUNK + PAGE, Reason.NONE)

    def test_short(self, made):
        hit = lookup(made, rig.tokens(PAGE - 1))
        assert (hit.tokens, hit.receipt.reason, hit.lease) == (0, Reason.SHORT, None)

    def test_never_stored(self, made):
        store(made, rig.tokens(CHUNK))
        hit = lookup(made, rig.tokens(2 * CHUNK))
        assert (hit.tokens, hit.receipt.reason) == (CHUNK, Reason.NEVER_STORED)

    def test_evicted(self, made):
        store(made, rig.tokens(CHUNK))
        store(made, rig.tokens(4 * CHUNK, seed=1))
        hit = lookup(made, rig.tokens(CHUNK))
        assert (hit.tokens, hit.receipt.reason) == (0, Reason.EVICTED)

    def test_stored_again_after_an_eviction(self, made):
        self.test_evicted(made)
        store(made, rig.tokens(CHUNK))
        made.clear()
        assert lookup(made, rig.tokens(CHUNK)).receipt.reason is Reason.NEVER_STORED

    def test_being_written(self, made):
        slots, _ = reserve(made, rig.tokens(2 * CHUNK))
        made.commit(slots[0], GEOMETRY)
        hit = lookup(made, rig.tokens(2 * CHUNK))
        assert (hit.tokens, hit.receipt.reason) == (CHUNK, Reason.BEING_WRITTEN)

    def test_no_room(self, made):
        store(made, rig.tokens(4 * CHUNK))
        hit = lookup(made, rig.tokens(4 * CHUNK))
        assert store(made, rig.tokens(CHUNK, seed=1)) is Reason.NO_ROOM
        assert made.counters["refused"] == 1
        made.release(hit.lease)
        assert store(made, rig.tokens(CHUNK, seed=1)) is Reason.NONE

    def test_timed_out(self, workshop):
        """The scheduler does not wait for a lock that another thread holds for long."""
        made = workshop.decider(4, patience_s=0.02)
        store(made, rig.tokens(CHUNK))
        held, done = threading.Event(), threading.Event()

        def hold():
            with made.lock:
                held.set()
                done.wait(10)

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        hit = lookup(made, rig.tokens(CHUNK))
        done.set()
        thread.join()
        assert (hit.tokens, hit.lease, hit.receipt.reason) == (0, None, Reason.TIMED_OUT)
        assert len(made.leases) == 0
        assert lookup(made, rig.tokens(CHUNK)).tokens == CHUNK


class TestRoom:
    def test_what_cannot_fit_evicts_nothing(self, workshop):
        """Not a chunk larger than all of the slab, nor one for which the rest leaves no room."""
        made = workshop.decider(4)
        store(made, rig.tokens(4 * CHUNK))
        large = Geometry(PAGE, PAGES, (8 * rig.SLOT,), bytes(32))
        _, reason = made.reserve(rig.chain(rig.tokens(CHUNK, 1)), large, 0, CHUNK, tail=True)
        assert (reason, len(made)) == (Reason.NO_ROOM, 4)
        leased = lookup(made, rig.tokens(4 * CHUNK), CHUNK)
        large = Geometry(PAGE, PAGES, (rig.SLOT,), bytes(32))  # four slots and a header
        _, reason = made.reserve(rig.chain(rig.tokens(CHUNK, 1)), large, 0, CHUNK, tail=True)
        assert (reason, len(made)) == (Reason.NO_ROOM, 4)
        made.release(leased.lease)

    def test_a_slab_of_nothing_stores_nothing(self, workshop):
        made = workshop.decider(0)
        assert made.capacity_bytes == 0
        assert store(made, rig.tokens(CHUNK)) is Reason.NO_ROOM

    def test_what_was_reserved_in_part_is_given_in_part(self, workshop):
        made = workshop.decider(2)
        slots, reason = reserve(made, rig.tokens(5 * CHUNK))
        assert (len(slots), reason) == (2, Reason.NO_ROOM)

    def test_chunks_are_evicted_one_by_one(self, made):
        store(made, rig.tokens(4 * CHUNK))
        store(made, rig.tokens(CHUNK, seed=1))
        assert (len(made), made.counters["evictions"]) == (4, 1)

    def test_the_end_of_a_prefix_goes_first(self, made):
        """A chunk without those before it is of no use."""
        store(made, rig.tokens(4 * CHUNK))
        made.release(lookup(made, rig.tokens(4 * CHUNK)).lease)
        for lost in range(1, 4):
            store(made, rig.tokens(CHUNK, seed=lost))
            assert lookup_tokens(made, rig.tokens(4 * CHUNK)) == (4 - lost) * CHUNK

    def test_what_a_reservation_finds_stored_was_used(self, made):
        for seed in range(4):
            store(made, rig.tokens(CHUNK, seed))
        store(made, rig.tokens(2 * CHUNK))
        stored = [seed for seed in range(4) if rig.chain(rig.tokens(CHUNK, seed)).key(0) in made]
        assert stored == [0, 2, 3]

    def test_a_slot_that_is_being_written_is_not_evicted(self, made):
        slots, _ = reserve(made, rig.tokens(3 * CHUNK))
        for seed in range(1, 10):
            assert store(made, rig.tokens(CHUNK, seed)) is Reason.NONE
        assert store(made, rig.tokens(2 * CHUNK, 50)) is Reason.NO_ROOM
        for slot in slots:
            made.commit(slot, GEOMETRY)
        assert lookup_tokens(made, rig.tokens(3 * CHUNK)) == 3 * CHUNK

    def test_the_memory_of_the_evicted_is_bounded(self, workshop, monkeypatch):
        monkeypatch.setattr("lmcache.core.shelf.REMEMBERED", 3)
        made = workshop.decider(1)
        for seed in range(6):
            store(made, rig.tokens(CHUNK, seed))
        reasons = [lookup(made, rig.tokens(CHUNK, seed)).receipt.reason for seed in range(5)]
        assert reasons == [Reason.NEVER_STORED] * 2 + [Reason.EVICTED] * 3


def lookup_tokens(made, sequence):
    """The length of a hit, without keeping it or moving its chunks from where they are."""
    chain, tokens = rig.chain(sequence), 0
    for chunk in range(len(sequence) // CHUNK):
        if chain.key(chunk) not in made:
            break
        tokens += CHUNK
    return tokens


class TestReserving:
    def test_known_chunks_are_not_reserved_again(self, made):
        store(made, rig.tokens(2 * CHUNK))
        slots, reason = reserve(made, rig.tokens(3 * CHUNK))
        assert ([slot.chunk for slot in slots], reason) == ([2], Reason.NONE)

    def test_chunks_that_another_stores_are_not_reserved_again(self, made):
        reserve(made, rig.tokens(2 * CHUNK))
        second, reason = reserve(made, rig.tokens(3 * CHUNK))
        assert ([slot.chunk for slot in second], reason) == ([2], Reason.NONE)

    @pytest.mark.parametrize("start", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
    def test_the_start_is_rounded_down_to_a_chunk(self, made, start):
        slots, _ = reserve(made, rig.tokens(2 * CHUNK), start=start)
        assert [slot.chunk for slot in slots] == list(range(start // CHUNK, 2))

    @pytest.mark.parametrize("tail", [True, False])
    @pytest.mark.parametrize("rest", [0, 1, PAGE - 1, PAGE, PAGE + 1, CHUNK - 1])
    def test_a_tail_is_whole_pages(self, made, rest, tail):
        slots, _ = reserve(made, rig.tokens(CHUNK + rest), tail=tail)
        pages = [GEOMETRY.pages_of(slot) for slot in slots]
        assert pages == [PAGES, *([rest // PAGE] if tail and rest >= PAGE else [])]

    @pytest.mark.parametrize("bad", [-1, 2**32, "x"])
    def test_tokens_without_a_key_leave_nothing_behind(self, made, bad):
        """The chunks before the bad one could be stored; whoever asked never learns of them."""
        sequence = [*rig.tokens(2 * CHUNK), bad, *rig.tokens(CHUNK)]
        with pytest.raises((OverflowError, TypeError)):
            reserve(made, sequence)
        assert made.free_bytes == made.capacity_bytes
        with pytest.raises((OverflowError, TypeError)):
            lookup(made, sequence[2 * CHUNK :])
        rig.assert_idle(made)
        assert store(made, rig.tokens(2 * CHUNK)) is Reason.NONE


class TestLeases:
    def test_a_lease_ends_at_its_deadline(self, made):
        store(made, rig.tokens(4 * CHUNK))
        lookup(made, rig.tokens(4 * CHUNK))
        made._clock.now += LEASE_S - 0.01
        assert store(made, rig.tokens(CHUNK, seed=1)) is Reason.NO_ROOM
        made._clock.now += 0.01
        assert store(made, rig.tokens(CHUNK, seed=1)) is Reason.NONE
        assert made.counters["expired_leases"] == 1
        rig.assert_idle(made)

    def test_a_lease_in_flight_has_no_deadline(self, made):
        store(made, rig.tokens(4 * CHUNK))
        hit = lookup(made, rig.tokens(4 * CHUNK))
        flights = Flights(made, GEOMETRY, [0])
        flights.depart([], [hit.lease], [])
        later = lookup(made, rig.tokens(4 * CHUNK), CHUNK)
        made._clock.now += 100 * LEASE_S
        assert store(made, rig.tokens(CHUNK, seed=1)) is Reason.NO_ROOM
        assert hit.lease in made.leases
        assert later.lease not in made.leases, "one in flight does not keep those after it alive"
        flights.ground()
        assert store(made, rig.tokens(CHUNK, seed=1)) is Reason.NONE

    def test_ending_a_lease_late_or_twice_does_nothing(self, made):
        store(made, rig.tokens(CHUNK))
        first, second = (lookup(made, rig.tokens(CHUNK)) for _ in range(2))
        made.release(first.lease)
        made.release(first.lease)
        assert store(made, rig.tokens(4 * CHUNK, seed=1)) is Reason.NO_ROOM
        made._clock.now += 2 * LEASE_S
        lookup(made, rig.tokens(PAGE))
        made.release(second.lease)
        made.release(None)
        rig.assert_idle(made)

    def test_uses_do_not_pile_up_where_nothing_is_stored(self, made):
        store(made, rig.tokens(2 * CHUNK))
        for _ in range(100):
            made.release(lookup(made, rig.tokens(2 * CHUNK)).lease)
        assert not made._shelf._used
        for _ in range(100):
            reserve(made, rig.tokens(2 * CHUNK))
        assert not made._shelf._used

    def test_many_leases_on_one_chunk(self, made):
        """A system prompt that a hundred thousand waiting requests share."""
        store(made, rig.tokens(CHUNK))
        entry = made.find(rig.chain(rig.tokens(CHUNK)).key(0))
        leases = [made.lease("r", [entry]) for _ in range(100_000)]
        assert store(made, rig.tokens(4 * CHUNK, seed=1)) is Reason.NO_ROOM
        for lease in leases:
            made.release(lease)
        rig.assert_idle(made)

    def test_an_owner_and_a_number_tell_leases_apart(self, made):
        store(made, rig.tokens(CHUNK))
        one, other = (lookup(made, rig.tokens(CHUNK)).lease for _ in range(2))
        assert (one.owner, other.owner) == ("r", "r")
        assert one.number != other.number
        assert sorted(lease.number for lease in made.leases) == [one.number, other.number]
        assert None not in made.leases


class TestDiscarding:
    def test_only_the_generation_that_is_meant(self, made):
        store(made, rig.tokens(CHUNK))
        [slot] = lookup(made, rig.tokens(CHUNK)).slots
        made._clock.now += 2 * LEASE_S
        lookup(made, rig.tokens(PAGE))
        made.discard(slot.key, slot.generation - 1)
        assert slot.key in made
        made.discard(slot.key, slot.generation)
        assert slot.key not in made
        made.discard(slot.key, slot.generation)
        assert lookup(made, rig.tokens(CHUNK)).receipt.reason is Reason.NEVER_STORED

    def test_not_while_it_is_leased(self, made):
        store(made, rig.tokens(CHUNK))
        hit = lookup(made, rig.tokens(CHUNK))
        made.discard(hit.slots[0].key, hit.slots[0].generation)
        assert hit.slots[0].key in made


class TestNotKeeping:
    @pytest.fixture
    def made(self, workshop):
        return workshop.decider(4, keep=False)

    def test_a_chunk_that_nobody_wants_is_gone_at_once(self, made):
        store(made, rig.tokens(2 * CHUNK))
        assert (len(made), made.free_bytes) == (0, made.capacity_bytes)

    def test_a_chunk_stays_while_it_is_pinned_or_leased(self, made):
        pinned = []
        made.listeners.on_commit = lambda slot: pinned.append(made.pin(slot.key))
        store(made, rig.tokens(2 * CHUNK))
        hit = lookup(made, rig.tokens(2 * CHUNK))
        for entry in pinned:
            made.unpin(entry)
        assert len(made) == 2
        made.release(hit.lease)
        assert (len(made), made.free_bytes) == (0, made.capacity_bytes)

    @pytest.mark.parametrize("lacking", [0, 1])
    def test_a_chunk_from_a_slower_tier_stays_for_who_fetched_it(self, made, lacking):
        [slot], _ = reserve(made, rig.tokens(CHUNK))
        with made.lock:
            lease = made.lease("r", [made.commit(slot, GEOMETRY, lacking=lacking)], is_use=False)
        assert slot.key in made
        made.release(lease)
        assert slot.key not in made


def test_whoever_hears_of_the_last_use_may_keep_a_chunk_that_was_to_go(workshop):
    made = workshop.decider(4, keep=False)
    kept = []
    made.listeners.on_use = lambda slots: kept.extend(made.pin(slot.key) for slot in slots)
    [slot], _ = reserve(made, rig.tokens(CHUNK))
    with made.lock:
        lease = made.lease("r", [made.commit(slot, GEOMETRY, lacking=1)])
    made.release(lease)
    assert (len(kept), len(made)) == (1, 1)
    made.unpin(kept.pop())
    rig.assert_idle(made)


def test_an_error_of_the_listener_leaves_the_chunk_in_order(made):
    def fail(slot):
        raise RuntimeError("on purpose")

    made.listeners.on_commit = fail
    [slot], _ = reserve(made, rig.tokens(CHUNK))
    with pytest.raises(RuntimeError, match="on purpose"):
        made.commit(slot, GEOMETRY)
    assert slot.key in made
    rig.assert_idle(made)


def test_what_no_tier_lacks_is_not_announced(made):
    seen = []
    made.listeners.on_commit = lambda slot: seen.append(slot.chunk)
    first, second, third = reserve(made, rig.tokens(3 * CHUNK))[0]
    made.commit(second, GEOMETRY, lacking=0)
    made.commit(first, GEOMETRY)
    made.commit(third, GEOMETRY, lacking=1)
    assert seen == [0, 2]


def test_generations_differ_between_processes(workshop):
    """A mover of a dead decider must not take a new slot for its own."""
    generations = [reserve(workshop.decider(1), rig.tokens(CHUNK))[0][0] for _ in range(20)]
    assert len({slot.generation >> 16 for slot in generations}) == 20


def test_two_engines_share_a_slab_and_never_a_chunk(workshop):
    made = workshop.decider(4)
    other = rig.geometry(2)
    store(made, rig.tokens(CHUNK))
    slots, _ = made.reserve(rig.chain(rig.tokens(CHUNK), salt="b"), other, 0, CHUNK, tail=True)
    made.commit(slots[0], other)
    assert lookup(made, rig.tokens(CHUNK)).slots[0].offset != slots[0].offset
    assert len(made) == 2


def test_find_says_absent(made):
    assert made.find(bytes(32)) == ABSENT
    assert bytes(32) not in made


def test_many_threads(workshop):
    """The lock holds: threads that store, look up and give up at random leave nothing behind."""
    made = workshop.decider(6, lease_s=0.01)
    failures = []

    def work(seed):
        rng = random.Random(seed)
        try:
            for _ in range(400):
                sequence = rig.tokens(rng.randint(1, 4 * CHUNK), seed=rng.randrange(4))
                slots, _ = reserve(made, sequence)
                for slot in slots:
                    made.commit(slot, GEOMETRY) if rng.random() < 0.7 else made.abandon(slot)
                hit = lookup(made, sequence)
                if rng.random() < 0.8:
                    made.release(hit.lease)
                if rng.random() < 0.05:
                    made.clear()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for lease in made.leases:
        made.release(lease)
    rig.assert_idle(made)


def test_a_slab_is_all_zero_and_as_large_as_it_says():
    slab = Slab.create(CONTROL_BYTES + 100)
    assert not any(slab.view)
    assert len(slab.view) == slab.size == CONTROL_BYTES + 100
    slab.close()
