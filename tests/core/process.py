"""A second process: `mover ENGINE NUMBER SLICE`, `lender ENGINE NUMBER` with pages on a GPU, or
`decider ENGINE MOVERS`, told what to do by lines.

Each line is a JSON object `{"do": NAME, ...}`, and each is answered with one line.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import rig

from lmcache.core.attachment import Attachment
from lmcache.core.geometry import Geometry
from lmcache.core.handover import Door, address_of
from lmcache.core.lender import Lender
from lmcache.core.lending import lendable
from lmcache.core.mover import Move, Mover
from lmcache.core.slab import Slab
from lmcache.core.tiers import Tiers


class Worker:
    """Pages and a door, as in the worker of an engine."""

    def __init__(self, engine, number, slice_index):
        self.number, self.slice_index = number, slice_index
        self.pages = rig.Pages(32, slice_index=slice_index)
        self.mover = None
        self.granted = 0
        hello = rig.hello(number, slice_index=slice_index, pages=self.pages, pid=os.getpid())
        self.door = Door(address_of(engine, number), hello, self.attach, self.leave)

    def attach(self, grant, fds):
        [fd] = fds
        geometry = Geometry(
            page_tokens=rig.PAGE_TOKENS,
            pages_per_chunk=grant.pages_per_chunk,
            slices=grant.slices,
            layout=grant.layout,
        )
        self.mover = Mover(
            self.pages.layout,
            geometry,
            Slab(fd, grant.slab_bytes),
            number=grant.word,
            slice_index=self.slice_index,
            writes=grant.writes,
        )
        self.granted += 1

    def leave(self):
        if self.mover:
            self.mover.retire()

    def compute(self, tokens, table):
        self.pages.compute(tokens, table)

    def poison(self):
        self.pages.poison()

    def wrong(self, tokens, table, stop):
        return self.pages.wrong(tokens, table, stop)

    def store(self, moves, step=0):
        moves = [Move(*move) for move in moves]
        self.mover.store(moves)
        self.mover.publish(moves)
        if step:
            self.mover.finish(step)

    def load(self, moves, step=0):
        _, failed = self.mover.load([Move(*move) for move in moves])
        if step:
            self.mover.finish(step)
        return failed

    def word(self, offset):
        return self.mover._slab.read_word(offset)

    def write_word(self, offset, value):
        self.mover._slab.write_word(offset, value)

    def grants(self):
        return self.granted


class GpuWorker(Worker):
    """Likewise, but its pages are on a GPU and lent: the decider's process copies them."""

    def __init__(self, engine, number):
        import torch

        self.host = rig.Pages(32, slice_index=number)
        self.tensor = torch.from_numpy(self.host.memory).cuda()
        self.memory = lendable([self.tensor])
        moved = self.tensor.data_ptr() - self.host.memory.ctypes.data
        regions = [replace(r, base=r.base + moved) for r in self.host.layout.regions]
        self.layout = replace(self.host.layout, regions=tuple(regions))
        self.mover, self.granted = None, 0
        hello = rig.hello(number, slice_index=number, pages=self.host, pid=os.getpid())
        address = address_of(engine, number)
        self.door = Door(address, hello, self.attach, self.leave, self.lend)

    def lend(self, visitor):
        return self.memory.lend(self.layout, visitor)

    def attach(self, grant, fds):
        self.mover = Lender(self.layout, fds, 5.0, memory=self.memory, given_up=self.door.hang_up)
        self.granted += 1

    def compute(self, tokens, table):
        self.host.memory[:] = self.tensor.cpu().numpy()
        self.host.compute(tokens, table)
        self.write()

    def poison(self):
        self.host.poison()
        self.write()

    def write(self):
        """Queue it behind work that takes a while, as a forward pass is."""
        import torch

        torch.cuda._sleep(50_000_000)
        # from other memory torch would wait for the work before
        pinned = torch.from_numpy(self.host.memory).pin_memory()
        self.tensor.copy_(pinned, non_blocking=True)

    def wrong(self, tokens, table, stop):
        self.host.memory[:] = self.tensor.cpu().numpy()
        return self.host.wrong(tokens, table, stop)

    def take_back(self):
        self.memory.take_back()

    def store(self, moves, step=0):
        moves = [Move(*move) for move in moves]
        self.mover.store(moves, None, self.mover.mark())
        self.mover.publish(moves)
        if step:
            self.mover.finish(step)

    def load(self, moves, step=0):
        _, failed = self.mover.load([Move(*move) for move in moves], None, self.mover.mark())
        if step:
            self.mover.finish(step)
        return failed


class Scheduler:
    """The deciding side, attached."""

    def __init__(self, engine, movers):
        def build(geometry):
            made = rig.decider(8)
            return made, Tiers(made, [])

        self.attachment = Attachment.open(engine, movers, rig.CHUNK_TOKENS, build, 10.0)

    def write_word(self, offset, value):
        self.attachment.decider.slab.write_word(offset, value)

    def whole(self):
        return self.attachment.is_whole()


def main(role, engine, *numbers):
    made = {"mover": Worker, "lender": GpuWorker, "decider": Scheduler}[role](
        engine, *map(int, numbers)
    )
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(getattr(made, order.pop("do"))(**order)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
