"""Pages on a GPU that another process copies, and the guard that keeps it out again.

The GPU is a file that both sides have mapped at addresses of their own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import rig
import torch

from lmcache.core import lent_device
from lmcache.core.attachment import Attachment
from lmcache.core.engine import moves_for
from lmcache.core.errors import DeviceError, HandoverError, LayoutError
from lmcache.core.handover import Door, address_of
from lmcache.core.kernels import copier, driver
from lmcache.core.kernels.host import HostPages
from lmcache.core.lender import Lender
from lmcache.core.lent_device import LentDevice
from lmcache.core.mover import Move
from lmcache.core.slab import anonymous_file
from lmcache.core.tiers import Tiers

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")

CHUNK = rig.CHUNK_TOKENS
SIZE = 1 << 20
GUARDS = SIZE - 4096
DEADLINE_S = 0.3
SHUT = -(1 << 31)


class Event:
    def __init__(self, gpu):
        self.gpu, self.waits = gpu, 0

    def synchronize(self):
        assert self.gpu.bound == 3, "or memory of another device is taken"
        self.waits += 1


class Gpu:
    """The driver and the guards, for both sides."""

    def __init__(self):
        fd = anonymous_file(SIZE)
        self.maps = [mmap.mmap(fd, SIZE) for _ in range(2)]
        os.close(fd)
        self.here, self.there = (
            ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in self.maps
        )
        self.memory = np.frombuffer(self.maps[0], np.uint8)
        self.words = self.memory[GUARDS:].view(np.int32)
        self.bound, self.events, self.opened = None, [], 0
        self.has_handles = True

    # the driver

    def bind(self, device):
        self.bound = device

    def identity(self, device):
        return bytes([device]) * 16

    def device_with(self, identity):
        if identity != bytes([3]) * 16:
            raise DeviceError(f"no GPU {identity.hex()} among the 1 of this process")
        return 5

    def allocation_of(self, address):
        assert self.here <= address < self.here + SIZE
        return self.here, SIZE

    def share(self, base):
        if not self.has_handles:
            raise DeviceError("cuIpcGetMemHandle failed with 1: invalid argument")
        assert base == self.here
        return b"handle".ljust(64)

    def open_shared(self, handle):
        assert handle == b"handle".ljust(64)
        assert self.bound == 5, "on the copier's thread, and by its number"
        self.opened += 1
        return self.there

    def close_shared(self, base):
        assert base == self.there
        self.opened -= 1

    # the guards

    def address(self, number):
        return self.here + GUARDS + 4 * number

    def mark_on(self, device):
        assert device.index == 3
        self.events.append(Event(self))
        return self.events[-1]

    def shut(self, number):
        self.words[number] |= SHUT

    def inside(self, number):
        return int(self.words[number]) & ~SHUT


class Copier(HostPages):
    """Writes to pages as kernels do: only if the guard lets it in."""

    def __init__(self, gpu, layout, planner, slab, guard):
        super().__init__(planner, slab, 1)
        self.word = gpu.words[(guard - gpu.there - GUARDS) // 4 :]
        self.layout = layout
        self.before, self.inside = threading.Event(), threading.Event()
        for gate in (self.before, self.inside):
            gate.set()

    def copy(self, spans, region, *, to_slab, after=None):
        if to_slab:
            return super().copy(spans, region, to_slab=True)
        self.before.wait(10)
        self.word[0] += 1
        try:
            is_in = self.word[0] > 0
            self.inside.wait(10)
            return super().copy(spans, region, to_slab=False) if is_in else 0
        finally:
            self.word[0] -= 1


@pytest.fixture
def gpu(monkeypatch):
    pytest.importorskip("triton", reason="needs Triton")
    from lmcache.core.kernels import cuda

    made = Gpu()
    made.copiers = []

    def pages(layout, planner, slab, device, threads, *, guard):
        assert (device.type, device.index) == ("cuda", 5)
        made.copiers.append(Copier(made, layout, planner, slab, guard))
        return made.copiers[-1]

    monkeypatch.setattr(driver, "Driver", lambda: made)
    monkeypatch.setattr(cuda, "CudaPages", pages)
    monkeypatch.setattr(lent_device, "mark_on", made.mark_on)
    yield made
    vars(made).clear()  # pytest keeps what fixtures return longer than descriptors may stay


class Rank:
    """A worker whose pages are on the GPU."""

    def __init__(self, workshop, gpu, engine):
        self.pages = rig.Pages(32, memory=gpu.memory)
        tensor = SimpleNamespace(
            data_ptr=lambda: self.pages.memory.ctypes.data, device=SimpleNamespace(index=3)
        )
        self.memory = LentDevice([tensor], gpu, gpu)
        self.mover, self.old, self.pid = None, [], 0
        hello = rig.hello(0, pages=self.pages)
        address = address_of(engine, 0)
        self.door = Door(address, hello, self.attach, self.leave, self.lend)
        workshop.later(self.close)

    def lend(self, visitor):
        assert visitor == os.getpid()
        return self.memory.lend(self.pages.layout, self.pid)

    def attach(self, grant, channels):
        self.mover = Lender(
            self.pages.layout,
            channels,
            DEADLINE_S,
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
        vars(self).clear()


@pytest.fixture
def engine():
    return rig.engine_id()


@pytest.fixture
def rank(workshop, gpu, engine):
    return Rank(workshop, gpu, engine)


@pytest.fixture
def attach(workshop, engine, rank):
    def attach():
        decider = workshop.decider(8)
        tiers = Tiers(decider, [])
        attachment = Attachment.open(engine, 1, CHUNK, lambda _: (decider, tiers), 5.0, words=[0])
        workshop.later(attachment.close)
        return attachment

    return attach


SEQUENCE = rig.tokens(CHUNK)


def store(attachment, rank, sequence=SEQUENCE):
    """Compute a chunk in the first pages and store it."""
    rank.pages.compute(sequence, range(4))
    slots, _ = attachment.reserve(rig.chain(sequence), 0, CHUNK, tail=True)
    number = attachment.depart(slots, [])
    moves = moves_for(slots, attachment.geometry, range(4), 0, 4)
    size = rank.mover.store(moves, None, rank.mover.mark())
    rank.mover.publish(moves)
    rank.mover.finish(number)

    def landed():
        attachment.flights.settle()
        return len(attachment.flights) == 0

    rig.wait_until(landed)
    return size


def load(attachment, rank, sequence=SEQUENCE):
    """Load it into pages 8 to 11; the moves that failed."""
    hit = attachment.lookup("r", rig.chain(sequence), CHUNK)
    number = attachment.depart([], [hit])
    moves = moves_for(hit.slots, attachment.geometry, range(8, 12), 0, 4)
    failed = rank.mover.load(moves, None, rank.mover.mark())[1]
    rank.mover.finish(number)
    return failed


def test_a_round_trip(gpu, rank, attach):
    attachment = attach()
    assert store(attachment, rank) == 4 * rig.PAGE_BYTES
    rank.pages.poison()
    assert load(attachment, rank) == []
    assert rank.pages.wrong(SEQUENCE, range(8, 12), CHUNK) == []
    assert rank.pages.untouched(except_for=range(8, 12))
    assert [event.waits for event in gpu.events] == [1, 1], "the engine's own work comes first"
    assert gpu.words.nonzero()[0].tolist() == [0], "the first was shut to have that compiled"
    attachment.close()
    assert gpu.opened == 0


def test_a_copier_that_hangs_before_its_kernel_writes_nothing(gpu, rank, attach):
    attachment = attach()
    store(attachment, rank)
    gpu.copiers[-1].before.clear()
    rank.pages.poison()
    started = time.monotonic()
    assert len(load(attachment, rank)) == 1
    assert time.monotonic() - started < 5 * DEADLINE_S
    assert not rank.mover.wants_back, "nothing is left for the engine's thread"
    gpu.copiers[-1].before.set()
    rig.wait_until(attachment.is_silent)
    assert rank.pages.untouched()


def test_a_kernel_under_way_is_waited_for(gpu, rank, attach):
    attachment = attach()
    store(attachment, rank)
    gpu.copiers[-1].inside.clear()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(load(attachment, rank)))
    thread.start()
    rig.wait_until(lambda: gpu.words[1] < 0)
    time.sleep(0.05)
    assert answers == [], "it still writes"
    gpu.copiers[-1].inside.set()
    thread.join()
    assert len(answers[0]) == 1


def test_a_kernel_of_a_dead_process_is_not(gpu, rank, attach):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    rank.pid = child.pid
    attachment = attach()
    store(attachment, rank)
    gpu.copiers[-1].inside.clear()
    assert len(load(attachment, rank)) == 1
    gpu.copiers[-1].inside.set()


def test_a_kernel_that_does_not_end_is_an_error(gpu, rank, attach, monkeypatch):
    monkeypatch.setattr(lent_device, "OUT_S", 0.1)
    rank.pid = os.getpid()
    attachment = attach()
    store(attachment, rank)
    gpu.copiers[-1].inside.clear()
    with pytest.raises(DeviceError, match=f"a kernel of process {os.getpid()} has not ended"):
        load(attachment, rank)
    gpu.copiers[-1].inside.set()
    move = Move(1 << 16, 1, 4, 0, [8])
    assert rank.mover.load([move])[1] == [move], "nothing is lent any more, whatever is answered"
    rig.wait_until(lambda: not attachment.is_whole())


def test_a_guard_that_was_shut_does_not_let_the_next_visitor_wait(gpu, rank, attach):
    first = attach()
    store(first, rank)
    gpu.copiers[-1].before.clear()
    load(first, rank)
    second = attach()
    store(second, rank)
    rank.pages.poison()
    gpu.copiers[0].before.set()  # it may still do what it was told long ago
    rig.wait_until(first.is_silent)
    assert rank.pages.untouched()
    assert load(second, rank) == []
    assert rank.pages.wrong(SEQUENCE, range(8, 12), CHUNK) == []
    assert gpu.words[1] == SHUT
    assert gpu.words[2] == 0


def test_a_guard_that_was_shut_is_not_used_again(gpu, rank, monkeypatch):
    monkeypatch.setattr(lent_device, "COUNT", 3)
    guards = [rank.lend(os.getpid())[0].guard for _ in range(5)]
    rank.memory.take_back()
    guards.append(rank.lend(os.getpid())[0].guard)
    assert guards == [*[gpu.address(1)] * 5, gpu.address(2)]
    rank.memory.take_back()
    with pytest.raises(HandoverError, match="taken back 3 times"):
        rank.lend(os.getpid())


@pytest.mark.parametrize("error", [ImportError("no module named triton"), RuntimeError("no room")])
def test_a_copier_that_cannot_be_made(gpu, rank, attach, monkeypatch, error):
    from lmcache.core.kernels import cuda

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(cuda, "CudaPages", fail)
    with pytest.raises(HandoverError, match=f"cannot use the engine's GPU: {error}"):
        attach()
    assert gpu.opened == 0
    assert rank.mover is None


def test_memory_without_handles_is_refused(gpu, workshop, engine):
    gpu.has_handles = False
    with pytest.raises(LayoutError, match="Expandable segments.*engine_driven"):
        Rank(workshop, gpu, engine)


def test_another_gpu_than_the_servers(gpu, rank, attach):
    rank.memory._identity = bytes(16)
    with pytest.raises(HandoverError, match="cannot use the engine's GPU: no GPU 0000"):
        attach()
    assert rank.mover is None


def test_pages_outside_what_is_lent(gpu, rank, attach):
    rank.pages.layout = rig.Pages(4).layout
    with pytest.raises(HandoverError, match="lies outside the lent memory"):
        attach()
    assert gpu.opened == 0


def test_who_has_ended():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not lent_device._is_gone(child.pid)
    child.stdin.close()
    rig.wait_until(lambda: lent_device._is_gone(child.pid))  # also before anybody waits for it
    child.wait()
    assert lent_device._is_gone(child.pid)
    assert not lent_device._is_gone(0), "nobody knows"


@pytest.mark.parametrize("others", [["cpu"], ["cuda:1"]])
def test_pages_in_several_places(others):
    where = [SimpleNamespace(device=torch.device(name)) for name in ("cuda:0", *others)]
    with pytest.raises(LayoutError, match=f"several devices: {min('cuda:0', *others)}, "):
        copier.device_of(where)
