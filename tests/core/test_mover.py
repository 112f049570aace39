"""A mover copies what it is told, says when a slot is not what was promised, decides nothing."""

from __future__ import annotations

import os
import random
import threading
import time

import numpy as np
import pytest
import rig

from lmcache.core import warming
from lmcache.core.layout import PageLayout, region_of
from lmcache.core.mover import Move, Mover
from lmcache.core.slab import CONTROL_BYTES, MOVER_BYTES, Slab
from lmcache.core.warming import Warmer

PAGES = rig.PAGES_PER_CHUNK
AT = CONTROL_BYTES


class Scene:
    """Pages, a slab of four slots, and a mover between them."""

    def __init__(self, workshop, *, slices=1, **options):
        self.pages = rig.Pages(16, slice_index=options.get("slice_index", 0))
        self.geometry = rig.geometry(slices)
        self.slab = Slab.create(CONTROL_BYTES + 4 * rig.SLOT)
        workshop.later(self.slab.close)
        self.mover = workshop.mover(self.pages, self.geometry, self.slab, **options)

    def move(self, slot=0, pages=range(PAGES), *, first=0, generation=7, slot_pages=PAGES):
        return Move(AT + slot * rig.SLOT, generation, slot_pages, first, list(pages))

    def tag(self, slot=0, index=0):
        return AT + slot * rig.SLOT + self.geometry.tag_offset(index)

    def store(self, *moves):
        size = self.mover.store(moves)
        self.mover.publish(moves)
        return size

    def fill(self, table=range(PAGES), seed=0):
        """Compute pages as an engine would; returns the tokens they are for."""
        sequence = rig.tokens(len(table) * rig.PAGE_TOKENS, seed)
        self.pages.compute(sequence, list(table))
        return sequence


@pytest.fixture
def scene(workshop):
    return Scene(workshop)


def test_a_round_trip(scene):
    sequence = scene.fill([3, 1, 4, 15])
    assert scene.store(scene.move(pages=[3, 1, 4, 15])) == 4 * rig.PAGE_BYTES
    scene.pages.poison()
    size, failed = scene.mover.load([scene.move(pages=[9, 2, 6, 5])])
    assert (size, failed) == (4 * rig.PAGE_BYTES, [])
    assert scene.pages.wrong(sequence, [9, 2, 6, 5], len(sequence)) == []
    assert scene.pages.untouched(except_for=[9, 2, 6, 5])


def test_region_by_region(scene):
    sequence = scene.fill()
    moves = [scene.move()]
    sizes = [scene.mover.store(moves, region) for region in range(rig.REGIONS)]
    assert sizes == [4 * rig.PAGE_BYTES // rig.REGIONS] * rig.REGIONS
    scene.mover.publish(moves)
    scene.pages.poison()
    for region in reversed(range(rig.REGIONS)):
        assert scene.mover.load(moves, region)[1] == []
        rest = scene.pages.memory[:region]
        assert (rest == rig.POISON).all(), "another region was loaded"
    assert scene.pages.wrong(sequence, range(4), len(sequence)) == []


def test_nothing_is_complete_before_it_is_published(scene):
    scene.fill()
    scene.mover.store([scene.move()])
    assert scene.slab.read_word(scene.tag()) == 0
    assert scene.mover.load([scene.move()]) == (0, [scene.move()])
    scene.mover.publish([scene.move()])
    assert scene.slab.read_word(scene.tag()) == 7


def test_a_slot_stored_in_part_is_not_complete(scene):
    """Or the rest of it, whatever it holds, would pass for this chunk."""
    scene.fill()
    for part in (scene.move(pages=[0, 1, 2]), scene.move(pages=[1, 2, 3], first=1)):
        scene.store(part)
        assert scene.slab.read_word(scene.tag()) == 0


def test_another_generation_is_a_failed_move(scene):
    scene.fill()
    scene.store(scene.move(0), scene.move(1, generation=8))
    scene.pages.poison()
    moves = [scene.move(0, range(4), generation=6), scene.move(1, range(4, 8), generation=8)]
    size, failed = scene.mover.load(moves)
    assert failed == moves[:1]
    assert size == 4 * rig.PAGE_BYTES
    assert scene.pages.untouched(except_for=range(4, 8)), "a failed move was copied nevertheless"


def test_equal_moves_fail_and_succeed_by_themselves(scene):
    scene.fill()
    scene.store(scene.move())
    bad = scene.move(generation=6)
    assert scene.mover.load([scene.move(), bad, scene.move(), bad])[1] == [bad, bad]


def test_a_slot_overwritten_while_it_is_loaded_is_a_failed_move(workshop):
    """Here the load itself overwrites it: the engine's page lies where the slot's words are."""
    geometry = rig.geometry()
    slab = Slab.create(CONTROL_BYTES + rig.SLOT)
    region = region_of(
        "evil",
        slab.address + AT + geometry.tag_offset(0),
        (1, rig.PAGE_BYTES),
        (rig.PAGE_BYTES, 1),
        itemsize=1,
        dtype="uint8",
        page_axis=0,
    )
    layout = PageLayout((region,), rig.PAGE_TOKENS, "evil")
    mover = Mover(layout, geometry, slab)
    workshop.later(mover.close)
    slab.write_word(AT + geometry.tag_offset(0), 7)
    move = Move(AT, 7, PAGES, 0, [0])
    assert mover.load([move]) == (rig.PAGE_BYTES, [move])


def test_a_load_that_succeeds_is_right_however_often_the_slot_changes(workshop):
    """A second thread gives the slot to another generation over and over, as evictions would."""
    scene = Scene(workshop)
    slots, stop = scene.slab.view, threading.Event()
    start = AT + scene.geometry.payload_offset(0, PAGES)
    size = PAGES * rig.PAGE_BYTES
    generation = [1]

    def overwrite():
        rng = random.Random(0)
        while not stop.is_set():
            number = generation[0] + 1
            scene.slab.write_word(scene.tag(), 0)
            slots[start : start + size] = bytes([number % 251]) * size
            scene.slab.write_word(scene.tag(), number)
            generation[0] = number
            time.sleep(rng.choice([0, 0, 1e-5, 1e-4]))

    thread = threading.Thread(target=overwrite)
    thread.start()
    good = bad = 0
    deadline = time.monotonic() + 20
    try:
        while (good < 300 or bad < 20) and time.monotonic() < deadline:
            number = generation[0]
            _, failed = scene.mover.load([scene.move(generation=number)])
            if failed:
                bad += 1
            else:
                good += 1
                loaded = scene.pages.memory[:, :PAGES]
                assert (loaded == number % 251).all(), "foreign bytes passed for loaded"
    finally:
        stop.set()
        thread.join()
    assert good


@pytest.mark.parametrize(
    "offset",
    [0, CONTROL_BYTES - 1, -rig.SLOT, -(2**62), CONTROL_BYTES + 4 * rig.SLOT, 2**62],
    ids=["words", "just before", "negative", "far negative", "past", "far past"],
)
def test_a_slot_outside_the_slab_is_refused(scene, offset):
    before, pages = bytes(scene.slab.view), scene.pages.memory.copy()
    move = scene.move()._replace(offset=offset)
    for act in (scene.mover.store, scene.mover.load, scene.mover.publish):
        with pytest.raises(IndexError, match="outside the slab"):
            act([move])
    assert scene.slab.view == before
    assert (scene.pages.memory == pages).all()


def test_the_last_slot_is_inside_and_one_more_page_is_not(scene):
    size = scene.geometry.slot_bytes(PAGES)
    last = scene.slab.size - size
    scene.fill()
    assert scene.store(scene.move()._replace(offset=last)) == PAGES * rig.PAGE_BYTES
    with pytest.raises(IndexError, match="outside the slab"):
        scene.store(scene.move()._replace(offset=last + 1))


@pytest.mark.parametrize("page", [-1, 16, 2**40])
def test_a_page_the_engine_does_not_have_is_refused(scene, page):
    before = bytes(scene.slab.view)
    with pytest.raises(IndexError, match="the engine has 16"):
        scene.store(scene.move(pages=[0, 1, page, 2]))
    assert scene.slab.view == before


def test_one_bad_move_stops_all_of_them(scene):
    """Before a byte is copied: who sends one such move knows nothing of this slab."""
    scene.fill()
    before = bytes(scene.slab.view)
    with pytest.raises(IndexError):
        scene.store(scene.move(0), scene.move(1, pages=[0, 1, 2, 99]))
    assert scene.slab.view == before


@pytest.mark.parametrize("act", ["store", "load", "publish"])
def test_no_moves(scene, act):
    assert getattr(scene.mover, act)([]) in (0, (0, []), None)


def test_a_twin_stores_nothing_and_loads_all_the_same(workshop):
    scene = Scene(workshop)
    twin = workshop.mover(scene.pages, scene.geometry, scene.slab, number=1, writes=False)
    sequence = scene.fill()
    before = bytes(scene.slab.view)
    assert twin.store([scene.move()]) == 0
    twin.publish([scene.move()])
    assert scene.slab.view == before
    scene.store(scene.move())
    scene.pages.poison()
    assert twin.load([scene.move()])[1] == []
    assert scene.pages.wrong(sequence, range(4), len(sequence)) == []


def test_slices_lie_side_by_side(workshop):
    scene = Scene(workshop, slices=3, number=1, slice_index=1)
    scene.fill()
    before = np.frombuffer(bytes(scene.slab.view), np.uint8)
    scene.store(scene.move())
    changed = np.flatnonzero(before != np.frombuffer(bytes(scene.slab.view), np.uint8))
    start = AT + scene.geometry.payload_offset(1, PAGES)
    word = scene.tag(index=1)
    inside = (start <= changed) & (changed < start + PAGES * rig.PAGE_BYTES)
    in_word = (word <= changed) & (changed < word + 8)
    assert (inside | in_word).all()
    assert inside.sum() > 700
    assert scene.slab.read_word(scene.tag(index=1)) == 7


@pytest.mark.parametrize("number", [0, 1, 63])
def test_a_mover_answers_in_its_own_word(workshop, number):
    scene = Scene(workshop, number=number)
    before = np.frombuffer(bytes(scene.slab.view), np.uint64)
    scene.mover.finish(2**40 + 5)
    after = np.frombuffer(bytes(scene.slab.view), np.uint64)
    assert np.flatnonzero(before != after).tolist() == [number * MOVER_BYTES // 8]
    assert scene.slab.read_word(number * MOVER_BYTES) == 2**40 + 5


def test_a_mover_spoils_in_a_word_of_its_own(workshop):
    scene = Scene(workshop, number=3)
    before = np.frombuffer(bytes(scene.slab.view), np.uint64)
    scene.mover.spoil(9)
    after = np.frombuffer(bytes(scene.slab.view), np.uint64)
    assert np.flatnonzero(before != after).tolist() == [3 * MOVER_BYTES // 8 + 1]
    assert scene.slab.read_word(3 * MOVER_BYTES + 8) == 9


def test_closing_ends_the_threads_and_lets_go_of_the_slab():
    slab = Slab.create(CONTROL_BYTES + rig.SLOT)
    fd = slab.fd
    mover = Mover(rig.Pages(4).layout, rig.geometry(), slab)
    mover.close()
    mover.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert not [t for t in threading.enumerate() if t.name.startswith("lmcache-")]


class TestSlab:
    def test_two_mappings_are_one_memory(self):
        one = Slab.create(1 << 16)
        other = Slab(os.dup(one.fd), one.size)
        one.write_word(4096, 2**63 + 5)
        assert other.read_word(4096) == 2**63 + 5
        other.view[5000:5003] = b"abc"
        assert one.view[5000:5003] == b"abc"
        one.close()
        assert other.view[5000:5003] == b"abc", "it goes with the last mapping"
        other.close()

    def test_it_goes_with_the_last_reference(self):
        """An attachment that is dropped must not keep gigabytes, and nobody closes it."""
        slab = Slab.create(1 << 16)
        fd = slab.fd
        del slab
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    @pytest.mark.parametrize("size", [0, -1, 2**62])
    def test_what_cannot_be_mapped_leaves_no_descriptor(self, size):
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises((OSError, ValueError, OverflowError)):
            Slab.create(size)
        assert len(os.listdir("/proc/self/fd")) == before

    def test_a_descriptor_that_cannot_be_mapped_is_closed_all_the_same(self):
        read, write = os.pipe()
        with pytest.raises((OSError, ValueError)):
            Slab(read, 4096)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(read)
        os.close(write)

    def test_what_is_still_looked_at_stays(self):
        """A slow backend may hold a part of a slab when the engine shuts down."""
        slab = Slab.create(1 << 16)
        slab.view[100:103] = b"abc"
        part = slab.view[100:103]
        slab.close()
        slab.close()
        assert part == b"abc"
        part[0] = 0

    def test_children_do_not_inherit_it(self):
        slab = Slab.create(4096)
        assert not os.get_inheritable(slab.fd)
        slab.close()

    def test_a_reader_never_sees_half_a_word(self):
        slab = Slab.create(4096)
        values, stop, seen = (0x00000000FFFFFFFF, 0xFFFFFFFF00000000), threading.Event(), set()
        slab.write_word(8, values[0])

        def write():
            while not stop.is_set():
                for value in values:
                    slab.write_word(8, value)

        thread = threading.Thread(target=write)
        thread.start()
        for _ in range(100_000):
            seen.add(slab.read_word(8))
        stop.set()
        thread.join()
        slab.close()
        assert seen <= set(values)


def resident(slab):
    """Bytes of the slab that have memory behind them."""
    return os.fstat(slab.fd).st_blocks * 512


@pytest.fixture
def can_populate():
    slab = Slab.create(1 << 16)
    slab.populate(0, slab.size)
    populated = resident(slab)
    slab.close()
    if not populated:
        pytest.skip("this kernel does not populate on request")


@pytest.mark.usefixtures("can_populate")
class TestWarming:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(warming, "AHEAD_BYTES", 1 << 20)
        monkeypatch.setattr(warming, "PIECE_BYTES", 1 << 18)

    def test_a_little_more_than_is_used_is_warm(self):
        slab = Slab.create(8 << 20)
        warmer = Warmer(slab)
        rig.wait_until(lambda: resident(slab) == 1 << 20)
        warmer.used(3 << 20)
        rig.wait_until(lambda: resident(slab) == 4 << 20)
        warmer.used(1 << 20)
        warmer.used((3 << 20) + 4096)
        time.sleep(0.05)
        assert resident(slab) == 4 << 20
        warmer.used(8 << 20)
        rig.wait_until(lambda: resident(slab) == 8 << 20)
        warmer.close()
        warmer.close()
        slab.close()

    def test_slots_that_end_within_a_page(self):
        slab = Slab.create(8 << 20)
        warmer = Warmer(slab)
        for end in ((1 << 20) + 640, (3 << 20) + 1280, 5 << 20):
            warmer.used(end)
            rig.wait_until(lambda end=end: resident(slab) >= end + (1 << 20))
        warmer.close()
        slab.close()

    def test_a_small_slab_is_warm_at_once_and_no_further(self):
        slab = Slab.create(100_000)
        warmer = Warmer(slab)
        rig.wait_until(lambda: resident(slab) >= 100_000)
        warmer.close()
        assert resident(slab) < 110_000
        slab.close()

    def test_nothing_beyond_the_slab_is_touched(self):
        class Watched(Slab):
            touched = 0

            def populate(self, offset, length):
                self.touched = max(self.touched, offset + length)
                super().populate(offset, length)

        slab = Watched.create((2 << 20) + 4096)
        warmer = Warmer(slab)
        warmer.used(slab.size)
        rig.wait_until(lambda: slab.touched >= slab.size)
        warmer.used(slab.size)
        warmer.close()
        assert slab.touched == slab.size
        slab.close()

    def test_it_is_touched_where_the_copies_are_made(self):
        slab, order = Slab.create(1 << 20), []
        populate = slab.populate

        def touch(offset, length):
            order.append(threading.current_thread().name)
            populate(offset, length)

        slab.populate = touch
        warmer = Warmer(slab, stay_near=lambda: order.append("near"))
        rig.wait_until(lambda: resident(slab) == 1 << 20)
        warmer.close()
        assert order == ["near", *["lmcache-warmer"] * 4]
        slab.close()

    def test_nothing_is_overwritten(self):
        slab = Slab.create(1 << 20)
        slab.view[:] = b"\7" * slab.size
        warmer = Warmer(slab)
        warmer.used(slab.size)
        warmer.close()
        assert slab.view == b"\7" * slab.size
        slab.close()
