"""Pages that another process copies: lent, borrowed, and taken back when it takes too long."""

from __future__ import annotations

import threading
import time

import msgspec
import pytest
import rig
import torch

from lmcache.core.attachment import Attachment
from lmcache.core.engine import moves_for
from lmcache.core.errors import HandoverError
from lmcache.core.handover import Door, address_of
from lmcache.core.lender import Lender
from lmcache.core.lent_memory import LentMemory
from lmcache.core.receipts import Reason
from lmcache.core.tiers import Tiers

CHUNK = rig.CHUNK_TOKENS


class LendingRank:
    """A worker whose pages are copied by the decider's process."""

    def __init__(self, workshop, engine, number=0, *, deadline_s=2.0, spans=None):
        self.pages = rig.Pages(32, slice_index=number, lends=True)
        self.memory = self.pages.lent
        self.deadline_s = deadline_s
        self.mover = None
        self.old = []
        self.spans = spans
        hello = rig.hello(number, slice_index=number, pages=self.pages)
        self.door = Door(address_of(engine, number), hello, self.attach, self.leave, self.lend)
        workshop.later(self.close)

    def lend(self, visitor):
        lending, fds = self.memory.lend(self.pages.layout, visitor)
        return msgspec.structs.replace(lending, spans=self.spans or lending.spans), fds

    def attach(self, grant, channels):
        self.mover = Lender(
            self.pages.layout,
            channels,
            self.deadline_s,
            memory=self.memory,
            given_up=self.door.hang_up,
        )

    def leave(self):
        if self.mover:
            self.mover.retire()
            self.old.append(self.mover)

    def close(self):
        self.door.close()
        for mover in {*self.old, self.mover} - {None}:
            mover.close()
        vars(self).clear()  # pytest keeps what fixtures return longer than descriptors may stay


@pytest.fixture
def engine():
    return rig.engine_id()


@pytest.fixture
def attach(workshop, engine):
    def attach(movers=1):
        decider = workshop.decider(8)
        attachment = Attachment.open(
            engine,
            movers,
            CHUNK,
            lambda _: (decider, Tiers(decider, [])),
            5.0,
            words=[*range(movers)],
        )
        workshop.later(attachment.close)
        return attachment

    return attach


def store(attachment, rank, sequence, table):
    geometry = attachment.geometry
    slots, reason = attachment.reserve(rig.chain(sequence), 0, len(sequence), tail=True)
    number = attachment.depart(slots, [])
    moves = moves_for(slots, geometry, table, 0, len(table))
    size = rank.mover.store(moves)
    rank.mover.publish(moves)
    rank.mover.finish(number)
    return size, reason


def load(attachment, rank, sequence, table):
    hit = attachment.lookup("r", rig.chain(sequence), len(sequence))
    number = attachment.depart([], [hit])
    moves = moves_for(hit.slots, attachment.geometry, table, 0, len(table))
    _, failed = rank.mover.load(moves)
    rank.mover.finish(number)
    return hit, failed


def landed(attachment):
    def look():
        attachment.flights.settle()
        return len(attachment.flights) == 0

    rig.wait_until(look)


class TestMemory:
    def test_what_is_lent_stays_where_it_is_and_what_it_was(self):
        base = torch.arange(1 << 16, dtype=torch.int32)
        view = base[100:200].view(10, 10)
        expected = base.clone()
        memory = LentMemory([view, base])
        assert len(memory.spans) == 1
        assert base.data_ptr() == memory.spans[0].address
        assert view.data_ptr() == base.data_ptr() + 400
        memory.take_back()
        assert torch.equal(base, expected)
        view[3, 4] = -1
        assert base[134] == -1

    def test_who_has_it_mapped_is_left_behind(self):
        import mmap

        base = torch.zeros(1 << 16, dtype=torch.uint8)
        memory = LentMemory([base])
        span = memory.spans[0]
        with mmap.mmap(span.fd, span.length) as theirs:
            theirs[5] = 7
            assert base[5] == 7
            memory.take_back()
            theirs[6] = 8
            base[7] = 9
            assert (base[5], base[6], theirs[7]) == (7, 0, 0)
        with mmap.mmap(span.fd, span.length) as again:
            assert (again[5], again[7]) == (7, 9), "the descriptor stands for what is there now"


class TestCopies:
    def test_a_round_trip(self, workshop, engine, attach):
        rank = LendingRank(workshop, engine)
        attachment = attach()
        sequence = rig.tokens(2 * CHUNK + 5)
        rank.pages.compute(sequence, range(10))
        size, reason = store(attachment, rank, sequence, range(10))
        assert (size, reason) == (9 * rig.PAGE_BYTES, Reason.NONE)
        landed(attachment)
        rank.pages.poison()
        hit, failed = load(attachment, rank, sequence, range(12, 22))
        assert (hit.tokens, failed) == (2 * CHUNK + 4, [])
        assert rank.pages.wrong(sequence, range(12, 22), hit.tokens) == []
        assert rank.pages.untouched(except_for=range(12, 21))
        landed(attachment)
        rig.assert_idle(attachment.decider)

    def test_slices_of_several_ranks(self, workshop, engine, attach):
        ranks = [LendingRank(workshop, engine, number) for number in range(2)]
        attachment = attach(2)
        sequence = rig.tokens(CHUNK)
        slots, _ = attachment.reserve(rig.chain(sequence), 0, CHUNK, tail=True)
        number = attachment.depart(slots, [])
        moves = moves_for(slots, attachment.geometry, range(4), 0, 4)
        for rank in ranks:
            rank.pages.compute(sequence, range(4))
            rank.mover.store(moves)
            rank.mover.publish(moves)
            rank.mover.finish(number)
        landed(attachment)
        for rank in ranks:
            rank.pages.poison()
            hit = attachment.lookup("r", rig.chain(sequence), CHUNK)
            moves = moves_for(hit.slots, attachment.geometry, range(8, 12), 0, 4)
            assert rank.mover.load(moves)[1] == []
            assert rank.pages.wrong(sequence, range(8, 12), CHUNK) == []
            attachment.release("r", hit)

    def test_a_slot_that_is_not_what_was_promised(self, workshop, engine, attach):
        rank = LendingRank(workshop, engine)
        attachment = attach()
        sequence = rig.tokens(2 * CHUNK)
        rank.pages.compute(sequence, range(8))
        store(attachment, rank, sequence, range(8))
        landed(attachment)
        hit = attachment.lookup("r", rig.chain(sequence), len(sequence))
        moves = moves_for(hit.slots, attachment.geometry, range(8), 0, 8)
        wrong = moves[1]._replace(generation=moves[1].generation + 1)
        assert rank.mover.load([moves[0], wrong])[1] == [wrong]
        attachment.release("r", hit)

    def test_what_is_spoiled_is_not_kept(self, workshop, engine, attach):
        rank = LendingRank(workshop, engine)
        attachment = attach()
        sequence = rig.tokens(CHUNK)
        slots, _ = attachment.reserve(rig.chain(sequence), 0, CHUNK, tail=True)
        number = attachment.depart(slots, [])
        moves = moves_for(slots, attachment.geometry, range(4), 0, 4)
        rank.mover.store(moves)
        rank.mover.publish(moves)
        rank.mover.spoil(number)
        rank.mover.finish(number)
        landed(attachment)
        assert len(attachment.decider) == 0

    def test_it_is_over_when_the_lender_lets_go(self, workshop, engine, attach):
        rank = LendingRank(workshop, engine)
        attachment = attach()
        assert not attachment.is_silent()
        rank.door.close()
        rig.wait_until(attachment.is_silent)
        assert rank.mover.load([(0, 0, 1, 0, [0])])[1], "nothing can be loaded any more"

    def test_it_is_over_when_the_decider_leaves(self, workshop, engine, attach):
        rank = LendingRank(workshop, engine)
        attachment = attach()
        attachment.leave()
        rig.wait_until(attachment.is_silent)
        rank.mover.finish(5)
        attach()
        assert len(rank.old) == 1

    def test_pages_outside_what_is_lent(self, workshop, engine, attach):
        rank = LendingRank(workshop, engine, spans=[(4096, 1 << 20)])
        with pytest.raises(HandoverError, match="lies outside the lent memory|shorter than"):
            attach()
        assert rank.mover is None


class TestACopierThatHangs:
    """The decider's lock is not held by copies, so a gate stands in for a process that is stopped;
    tests/engines stops a real one."""

    @pytest.fixture
    def scene(self, workshop, engine, attach):
        rank = LendingRank(workshop, engine, deadline_s=0.2)
        attachment = attach()
        sequence = rig.tokens(CHUNK)
        rank.pages.compute(sequence, range(4))
        store(attachment, rank, sequence, range(4))
        landed(attachment)
        go = threading.Event()
        workshop.later(go.set)
        mover = attachment.borrowers[0]._mover
        for name in ("load", "store"):
            whole = getattr(mover, name)

            def late(*args, whole=whole):
                go.wait(10)
                return whole(*args)

            setattr(mover, name, late)
        return rank, attachment, sequence, go

    def test_a_store_is_given_up(self, scene):
        rank, attachment, _, go = scene
        started = time.monotonic()
        size, _ = store(attachment, rank, rig.tokens(CHUNK, 3), range(4))
        assert size == 0
        assert 0.2 <= time.monotonic() - started < 1.0
        rig.wait_until(lambda: not attachment.is_whole())
        assert not attachment.is_silent(), "it still copies"
        go.set()
        rig.wait_until(attachment.is_silent)
        attachment.flights.ground()
        assert len(attachment.decider) == 1, "only what was there before"

    def test_a_load_waits_for_the_pages_to_be_taken_back(self, scene):
        rank, attachment, sequence, go = scene
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(load(attachment, rank, sequence, range(8, 12)))
        )
        thread.start()
        rig.wait_until(lambda: rank.mover.wants_back)
        assert answers == []
        rank.pages.poison()
        before = rank.pages.read(8)
        rank.mover.take_back()
        thread.join()
        [(_, failed)] = answers
        assert len(failed) == 1
        go.set()
        rig.wait_until(attachment.is_silent)
        assert rank.pages.read(8) == before, "the late copy went to memory nobody uses"
        attachment.flights.ground()
        rig.assert_idle(attachment.decider)

    def test_a_load_that_is_only_late(self, scene):
        rank, attachment, sequence, go = scene
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(load(attachment, rank, sequence, range(8, 12)))
        )
        thread.start()
        rig.wait_until(lambda: rank.mover.wants_back)
        go.set()
        thread.join()
        [(_, failed)] = answers
        assert failed == []
        assert not rank.mover.wants_back
        rank.mover.take_back()
        assert rank.pages.wrong(sequence, range(8, 12), CHUNK) == []

    def test_the_memory_is_lent_anew(self, scene, attach):
        rank, attachment, sequence, go = scene
        thread = threading.Thread(target=load, args=(attachment, rank, sequence, range(8, 12)))
        thread.start()
        rig.wait_until(lambda: rank.mover.wants_back)
        rank.mover.take_back()
        thread.join()
        go.set()
        rig.wait_until(attachment.is_silent)
        again = attach()
        sequence = rig.tokens(CHUNK, 5)
        rank.pages.compute(sequence, range(4))
        assert store(again, rank, sequence, range(4))[0]
        landed(again)
        rank.pages.poison()
        hit, failed = load(again, rank, sequence, range(4))
        assert (hit.tokens, failed) == (CHUNK, [])
        assert rank.pages.wrong(sequence, range(4), CHUNK) == []
