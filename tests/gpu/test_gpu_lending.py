"""Pages on the GPU of another process: what a server does that copies itself."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import rig

from lmcache.core.attachment import Attachment
from lmcache.core.engine import moves_for
from lmcache.core.kernels.paths import PATHS
from lmcache.core.tiers import Tiers

CHUNK = rig.CHUNK_TOKENS


def pinned(pages):
    """Wait until all of its slab is: before that every path is the same one."""

    def is_pinned():
        with pages._pins.held() as ends:
            return len(ends) and ends[-1] == pages._pins._slab.size

    rig.wait_until(is_pinned, 30)


class Scene:
    """An engine's worker in a process of its own, and the side that copies in this one."""

    def __init__(self):
        engine = rig.engine_id()
        self.later = ExitStack()
        self.worker = rig.Process("lender", engine, 0)
        self.later.callback(self.worker.kill)
        self.worker.ready()
        self.decider = rig.decider(8)
        tiers = Tiers(self.decider, [])
        self.attachment = Attachment.open(
            engine, 1, CHUNK, lambda _: (self.decider, tiers), 60.0, words=[0]
        )
        self.later.callback(self.decider.slab.close)
        self.later.callback(self.attachment.close)
        self.mover = self.attachment.borrowers[0]._mover

    def store(self, sequence, table):
        self.worker.do("compute", tokens=[*sequence], table=[*table])
        slots, _ = self.attachment.reserve(rig.chain(sequence), 0, len(sequence), tail=True)
        number = self.attachment.depart(slots, [])
        moves = moves_for(slots, self.attachment.geometry, table, 0, len(table))
        self.worker.do("store", moves=moves, step=number)

        def landed():
            self.attachment.flights.settle()
            return len(self.attachment.flights) == 0

        rig.wait_until(landed)

    def moves(self, sequence, table):
        hit = self.attachment.lookup("r", rig.chain(sequence), len(sequence))
        number = self.attachment.depart([], [hit])
        return moves_for(hit.slots, self.attachment.geometry, table, 0, len(table)), number

    def wrong(self, sequence, table):
        return self.worker.do("wrong", tokens=[*sequence], table=[*table], stop=len(sequence))


@pytest.fixture
def scene():
    made = Scene()
    yield made
    made.later.close()


@pytest.mark.parametrize("path", PATHS)
def test_pages_go_out_and_come_back(scene, path):
    pages = scene.mover._pages
    pages.paths.forced = path
    pinned(pages)
    sequence, table = rig.tokens(2 * CHUNK), range(8, 16)
    scene.store(sequence, range(8))
    scene.worker.do("poison")
    moves, number = scene.moves(sequence, table)
    assert scene.worker.do("load", moves=moves, step=number) == []
    assert scene.wrong(sequence, table) == []


def test_what_has_been_taken_back_is_not_written_to(scene):
    sequence, table = rig.tokens(CHUNK), range(8, 12)
    scene.store(sequence, range(4))
    scene.worker.do("poison")
    moves, _ = scene.moves(sequence, table)
    scene.worker.do("take_back")
    _, failed = scene.mover.load(moves)
    assert failed == [], "who copies does not notice"
    assert scene.wrong(sequence, table) == [0, 1, 2, 3]
