"""What is in the air belongs to the movers until they have answered, every one of them."""

from __future__ import annotations

import pytest
import rig

from lmcache.core.flights import Flights
from lmcache.core.receipts import Reason
from lmcache.core.slab import MOVER_BYTES

CHUNK = rig.CHUNK_TOKENS


class Scene:
    """A decider, and movers that do nothing but write their words."""

    def __init__(self, workshop, *, movers=1, slices=1, **options):
        self.clock = rig.Clock()
        self.decider = workshop.decider(4, clock=self.clock, lease_s=10.0, **options)
        self.geometry = rig.geometry(slices)
        self.flights = Flights(self.decider, self.geometry, range(movers))

    @property
    def counters(self):
        return self.decider.counters

    def reserve(self, chunks=1, seed=0):
        chain = rig.chain(rig.tokens(chunks * CHUNK, seed))
        return self.decider.reserve(chain, self.geometry, 0, chunks * CHUNK, tail=True)[0]

    def stored(self, chunks=1, seed=0):
        """Chunks that are complete, and a hit on them."""
        for slot in self.reserve(chunks, seed):
            self.publish(slot)
            self.decider.commit(slot, self.geometry)
        return self.lookup(chunks, seed)

    def lookup(self, chunks=1, seed=0):
        chain = rig.chain(rig.tokens(chunks * CHUNK, seed))
        return self.decider.lookup("r", chain, self.geometry, chunks * CHUNK)

    def publish(self, slot, *slices):
        for index in slices or range(len(self.geometry.slices)):
            where = slot.offset + self.geometry.tag_offset(index)
            self.decider.slab.write_word(where, slot.generation)

    def finish(self, number, mover=0):
        self.decider.slab.write_word(mover * MOVER_BYTES, number)
        self.flights.settle()

    def __contains__(self, slot):
        return slot.key in self.decider


@pytest.fixture
def scene(workshop):
    return Scene(workshop)


def test_a_store_becomes_visible_when_it_has_landed(scene):
    [slot] = scene.reserve()
    number = scene.flights.depart([slot], [], [])
    scene.publish(slot)
    scene.flights.settle()
    assert slot not in scene
    assert scene.lookup().receipt.reason is Reason.BEING_WRITTEN
    scene.finish(number)
    assert slot in scene
    assert scene.counters["stored_tokens"] == CHUNK
    assert scene.counters["stored_bytes"] == rig.PAGES_PER_CHUNK * rig.PAGE_BYTES
    assert len(scene.flights) == 0


def test_a_store_that_was_not_completed_is_given_up(scene):
    slots = scene.reserve(3)
    number = scene.flights.depart(slots, [], [])
    scene.publish(slots[1])
    scene.finish(number)
    assert [slot in scene for slot in slots] == [False, True, False]
    assert scene.counters["store_failures"] == 2
    assert scene.counters["stored_tokens"] == CHUNK
    rig.assert_idle(scene.decider)


def test_a_slot_of_another_generation_is_not_complete(scene):
    [slot] = scene.reserve()
    number = scene.flights.depart([slot], [], [])
    scene.publish(slot._replace(generation=slot.generation - 1))
    scene.finish(number)
    assert slot not in scene


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_every_slice_must_have_been_stored(workshop, missing):
    scene = Scene(workshop, movers=3, slices=3)
    [slot] = scene.reserve()
    number = scene.flights.depart([slot], [], [])
    scene.publish(slot, *{0, 1, 2} - {missing})
    for mover in range(3):
        scene.finish(number, mover)
    assert slot not in scene
    assert scene.counters["store_failures"] == 1


@pytest.mark.parametrize("last", [0, 1, 2])
def test_the_slowest_mover_counts(workshop, last):
    scene = Scene(workshop, movers=3)
    hit = scene.stored()
    number = scene.flights.depart([], [hit.lease], hit.slots)
    for mover in {0, 1, 2} - {last}:
        scene.finish(number, mover)
    assert hit.lease in scene.decider.leases
    scene.finish(number, last)
    assert hit.lease not in scene.decider.leases


def test_steps_land_in_order(scene):
    hits = [scene.stored(seed=seed) for seed in range(3)]
    numbers = [scene.flights.depart([], [hit.lease], hit.slots) for hit in hits]
    scene.finish(numbers[1])
    assert [hit.lease in scene.decider.leases for hit in hits] == [False, False, True]
    assert len(scene.flights) == 1
    scene.finish(numbers[2])
    assert len(scene.decider.leases) == 0


def test_a_step_that_never_arrived_ends_with_the_next(scene):
    """Engines drop steps, e.g. when all requests in one are aborted."""
    [lost] = scene.reserve(seed=1)
    scene.flights.depart([lost], [], [])
    [slot] = scene.reserve(seed=2)
    number = scene.flights.depart([slot], [], [])
    scene.publish(slot)
    scene.finish(number)
    assert (lost in scene, slot in scene) == (False, True)
    rig.assert_idle(scene.decider)


def test_a_step_may_land_out_of_turn(scene):
    """In one thread, a layer-wise store may be half done while another request comes and goes."""
    slow, quick = scene.reserve(seed=1)[0], scene.reserve(seed=2)[0]
    first = scene.flights.depart([slow], [], [])
    second = scene.flights.depart([quick], [], [])
    scene.publish(quick)
    scene.flights.land(second)
    assert (slow in scene, quick in scene) == (False, True)
    assert scene.decider.why_absent(slow.key) is Reason.BEING_WRITTEN, "somebody writes to it yet"
    scene.publish(slow)
    scene.flights.land(first)
    assert slow in scene


def test_a_lease_in_the_air_outlives_its_deadline(scene):
    hit = scene.stored()
    number = scene.flights.depart([], [hit.lease], hit.slots)
    scene.clock.now += 1000
    scene.lookup(seed=5)
    assert hit.lease in scene.decider.leases
    scene.finish(number)
    assert hit.lease not in scene.decider.leases
    assert scene.counters["expired_leases"] == 0


def test_a_slot_in_the_air_is_not_given_away(scene):
    [slot] = scene.reserve()
    scene.flights.depart([slot], [], [])
    scene.clock.now += 1000
    others = [s.offset for seed in range(1, 9) for s in scene.stored(seed=seed).slots]
    assert slot.offset not in others


def test_the_dead_give_back_what_they_had(workshop):
    scene = Scene(workshop, movers=2)
    hit = scene.stored(2)
    done, undone = scene.reserve(2, seed=1)
    scene.flights.depart([done, undone], [hit.lease], hit.slots)
    scene.publish(done)
    scene.finish(1, 0)
    assert len(scene.flights) == 1
    scene.flights.ground()
    assert (done in scene, undone in scene) == (True, False)
    assert len(scene.flights) == 0
    rig.assert_idle(scene.decider)


def test_a_slot_that_is_not_what_it_was_is_dropped(scene):
    hit = scene.stored(2)
    number = scene.flights.depart([], [hit.lease], hit.slots)
    where = hit.slots[1].offset + scene.geometry.tag_offset(0)
    scene.decider.slab.write_word(where, 12345)
    scene.finish(number)
    assert scene.counters["load_failures"] == 1
    assert [slot in scene for slot in hit.slots] == [True, False]
    assert scene.lookup(2).tokens == CHUNK


def test_a_bad_slot_that_others_load_is_dropped_by_the_last_of_them(scene):
    hits = [scene.stored(), scene.lookup()]
    numbers = [scene.flights.depart([], [hit.lease], hit.slots) for hit in hits]
    scene.decider.slab.write_word(hits[0].slots[0].offset + scene.geometry.tag_offset(0), 0)
    scene.finish(numbers[0])
    assert hits[0].slots[0] in scene
    scene.finish(numbers[1])
    assert hits[0].slots[0] not in scene


def test_an_error_in_one_chunk_leaks_no_other(scene):
    """The listener is whoever writes to slower tiers; the movers' slots must not suffer from it."""
    hit = scene.stored()
    seen = []

    def fail_first(slot):
        seen.append(slot)
        if len(seen) == 1:
            raise RuntimeError("on purpose")

    scene.decider.listeners.on_commit = fail_first
    slots = scene.reserve(3, seed=1)
    number = scene.flights.depart(slots, [hit.lease], hit.slots)
    for slot in slots[:2]:
        scene.publish(slot)
    with pytest.raises(RuntimeError, match="on purpose"):
        scene.finish(number)
    assert seen == slots[:2]
    assert len(scene.flights) == 0
    assert scene.counters["stored_tokens"] == 2 * CHUNK
    rig.assert_idle(scene.decider)


def test_nothing_in_the_air(scene):
    scene.flights.settle()
    scene.flights.ground()
    assert len(scene.flights) == 0


def test_what_is_not_kept_is_gone_once_loaded(workshop):
    scene = Scene(workshop, keep=False)
    scene.decider.listeners.on_commit = lambda slot: pins.append(scene.decider.pin(slot.key))
    pins = []
    hit = scene.stored()
    scene.decider.unpin(pins.pop())
    number = scene.flights.depart([], [hit.lease], hit.slots)
    assert hit.slots[0] in scene
    scene.finish(number)
    assert hit.slots[0] not in scene
    assert scene.counters["load_failures"] == 0
    assert scene.decider.free_bytes == scene.decider.capacity_bytes


class TestSpoiling:
    """A load failed, the engine computed on with what was in its pages, and stored the result."""

    def spoil(self, scene, number, mover=0):
        scene.decider.slab.write_word(mover * MOVER_BYTES + 8, number)

    def test_nothing_of_a_spoiled_step_is_kept(self, scene):
        slots = scene.reserve(2)
        number = scene.flights.depart(slots, [], [])
        for slot in slots:
            scene.publish(slot)
        self.spoil(scene, number)
        scene.finish(number)
        assert [slot in scene for slot in slots] == [False, False]
        assert scene.counters["store_failures"] == 2
        assert scene.counters["stored_tokens"] == 0
        rig.assert_idle(scene.decider)

    @pytest.mark.parametrize("mover", [0, 1])
    def test_one_mover_spoils_it_for_all(self, workshop, mover):
        scene = Scene(workshop, movers=2, slices=2)
        [slot] = scene.reserve()
        number = scene.flights.depart([slot], [], [])
        scene.publish(slot)
        self.spoil(scene, number, mover)
        for each in range(2):
            scene.finish(number, each)
        assert slot not in scene

    def test_the_step_after_it_is_kept(self, scene):
        slots = [scene.reserve(seed=seed)[0] for seed in range(2)]
        numbers = [scene.flights.depart([slot], [], []) for slot in slots]
        for slot in slots:
            scene.publish(slot)
        self.spoil(scene, numbers[0])
        scene.finish(numbers[1])
        assert [slot in scene for slot in slots] == [False, True]

    def test_what_it_loaded_is_let_go(self, scene):
        hit = scene.stored()
        [slot] = scene.reserve(seed=1)
        number = scene.flights.depart([slot], [hit.lease], hit.slots)
        scene.publish(slot)
        self.spoil(scene, number)
        scene.finish(number)
        assert hit.slots[0] in scene
        assert len(scene.decider.leases) == 0
