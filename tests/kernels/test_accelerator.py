"""Whatever path is taken, the same bytes arrive, and none while the slab is not pinned."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pools
import pytest
import torch
from lazy import LazyDevice, Stream

from lmcache.core.errors import ConfigError, DeviceError
from lmcache.core.kernels import pinning
from lmcache.core.kernels.accelerator import AcceleratorPages, BothWays
from lmcache.core.kernels.paths import PATHS, Paths, forced_path
from lmcache.core.kernels.pinning import Pins, are_held
from lmcache.core.kernels.plan import Planner, Span
from lmcache.core.slab import Slab

POOLS = {
    "layers": pools.vllm("LBHNC", torch.uint8, 2, 4, layers=5),
    "blocks first": pools.vllm("BLHNC", torch.uint8, 2, 4, layers=3),
    "padded": pools.mla(torch.bfloat16, 4, padding=28),
}
SPANS = [(5, 0, [7, 2, 3, 10, 0]), (4, 1, [1, 5]), (1, 0, [9])]
PAGES = [7, 2, 3, 10, 0, 1, 5, 9]
SLAB = 1 << 16


class Registrar:
    """Pins memory unless it is `full`, and waits for `may_go_on` each time."""

    def __init__(self, room=1 << 60):
        self.room, self.pieces, self.may_go_on = room, [], threading.Event()
        self.may_go_on.set()

    def register(self, address, size):
        self.may_go_on.wait()
        for start, length in self.pieces:
            if start < address + size and address < start + length:
                raise DeviceError("cuMemHostRegister failed with 712: already registered")
        if sum(size for _, size in self.pieces) + size > self.room:
            raise DeviceError("cuMemHostRegister failed with 2: out of memory")
        self.pieces.append((address, size))

    def unregister(self, address):
        [found] = [piece for piece in self.pieces if piece[0] == address]
        self.pieces.remove(found)


@pytest.fixture
def slab():
    made = Slab.create(SLAB)
    yield made
    made.close()


@pytest.fixture
def pins_of(slab, monkeypatch):
    """Pins in pieces of 8, 16 and 32 KiB and the rest."""
    monkeypatch.setattr(pinning, "FIRST_BYTES", 8192)
    monkeypatch.setattr(pinning, "MOST_BYTES", 32768)
    made = []

    def build(registrar, *, wait=True):
        made.append(Pins(slab, registrar))
        if wait:
            made[-1]._thread.join(5)
        return made[-1]

    yield build
    for pins in made:
        pins.close()


ACROSS, INSIDE = 8000, 8192
"""Where objects begin: so that one lies in two pinned pieces, or all of them in one."""


def spans_of(layout, at=INSIDE):
    spans = []
    for count, first, pages in SPANS:
        spans.append(Span(at, count, first, pages))
        at += count * layout.page_bytes
    assert at < SLAB
    return spans


def pages_on(device, slab, pool, pins, path):
    return AcceleratorPages(
        pool.layout,
        device.planner,
        device,
        slab,
        pins=pins,
        paths=Paths({}, path),
        buffer_bytes=700,
    )


@pytest.mark.parametrize("room", [0, 1 << 20], ids=["not pinned", "pinned"])
@pytest.mark.parametrize("region", [None, 2])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("at", [ACROSS, INSIDE], ids=["across", "inside"])
@pytest.mark.parametrize("name", POOLS)
def test_every_path_copies_the_same(slab, pins_of, name, at, path, region, room):
    pool = POOLS[name]
    pool.fill()
    planner, spans = Planner(pool.layout), spans_of(pool.layout, at)
    runs = planner.plan(spans, region)
    expected = np.zeros(SLAB, np.uint8)
    base, memory = pool.memory.data_ptr(), pool.memory.numpy()
    for engine, stored, length in zip(runs.engine, runs.stored, runs.length, strict=True):
        expected[stored : stored + length] = memory[engine - base : engine - base + length]
    for seed in range(5):
        device = LazyDevice(planner, seed)
        pins = pins_of(Registrar(room))
        pages = pages_on(device, slab, pool, pins, path)
        slab.view[:] = bytes(SLAB)
        before = pool.memory.clone()
        assert pages.copy(spans, region, to_slab=True) == runs.total_bytes
        assert bytes(slab.view) == expected.tobytes()
        if room == 0:
            inside = range(slab.address, slab.address + SLAB)
            assert not [r for r in device.copied if r[0] in inside or r[1] in inside]
        for index in range(len(pool.tensors)) if region is None else [region]:
            for page in PAGES:
                pool.tensors[index][page].zero_()
        assert not torch.equal(pool.memory, before)
        assert pages.copy(spans, region, to_slab=False) == runs.total_bytes
        assert torch.equal(pool.memory, before)
        pages.close()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("to_slab", [True, False])
def test_every_path_waits_for_the_engine(slab, pins_of, path, to_slab):
    pool = POOLS["layers"]
    pool.fill()
    planner, spans = Planner(pool.layout), spans_of(pool.layout)
    final = pool.memory.clone()
    for seed in range(10):
        device = LazyDevice(planner, seed)
        pages = pages_on(device, slab, pool, pins_of(Registrar()), path)
        forward = device.stream()
        if to_slab:
            slab.view[:] = bytes(SLAB)
            pool.memory.zero_()
            forward.call(lambda: pool.memory.copy_(final))
            pages.copy(spans, None, to_slab=True, after=forward.record())
            pool.memory.zero_()
        else:
            pages.copy(spans, None, to_slab=True)
            forward.call(lambda: [t[page].zero_() for t in pool.tensors for page in PAGES])
        pages.copy(spans, None, to_slab=False, after=forward.record())
        for tensor, whole in zip(pool.tensors, _like(pool, final), strict=True):
            assert torch.equal(tensor[PAGES], whole[PAGES])
        pool.memory.copy_(final)
        pages.close()


def _like(pool, memory):
    """The pool's tensors, over other memory."""
    return [
        memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        for tensor in pool.tensors
    ]


@pytest.mark.parametrize("path", PATHS)
def test_only_kernels_write_to_guarded_pages(slab, pins_of, path, monkeypatch):
    pool = POOLS["layers"]
    pool.fill()
    device = LazyDevice(Planner(pool.layout), 0)
    device.kernels_only = True
    targets, copy = [], Stream.copy

    def note(stream, target, source, length, *, stays):
        targets.extend(target.tolist())
        copy(stream, target, source, length, stays=stays)

    monkeypatch.setattr(Stream, "copy", note)
    pages = pages_on(device, slab, pool, pins_of(Registrar()), path)
    expected = pool.memory.clone()
    pages.copy(spans_of(pool.layout), None, to_slab=True)
    assert bool(targets) is (path != "kernel"), "stores may take any path"
    targets.clear()
    for tensor in pool.tensors:
        tensor[PAGES] = 0
    pages.copy(spans_of(pool.layout), None, to_slab=False)
    assert torch.equal(pool.memory, expected)
    first, size = pool.memory.data_ptr(), pool.memory.numel() * pool.memory.element_size()
    assert not [target for target in targets if first <= target < first + size]
    pages.close()


def test_a_store_and_a_load_may_be_under_way_at_a_time(slab):
    """But of one kind only one is, for they share buffers."""
    inside, most, go = Counter(), Counter(), threading.Event()
    lock = threading.Lock()

    class Slow:
        def copy(self, spans, region, *, to_slab, after):
            with lock:
                inside[to_slab] += 1
                most[to_slab] = max(most[to_slab], inside[to_slab])
                most["all"] = max(most["all"], inside.total())
                if most["all"] > 1:
                    go.set()
            assert go.wait(5)
            time.sleep(0.05)  # for whoever would come in beside it
            with lock:
                inside[to_slab] -= 1
            return 7

        def close(self):
            inside["closed"] += 1

    ways = BothWays(Slow)
    with ThreadPoolExecutor(4) as pool:
        sizes = [pool.submit(ways.copy, [], None, to_slab=n % 2 == 0) for n in range(4)]
        assert [size.result() for size in sizes] == [7] * 4
    assert (most[True], most[False], most["all"]) == (1, 1, 2)
    ways.close()
    assert inside["closed"] == 2


def test_one_way_that_cannot_be_made_leaves_nothing(slab):
    made = []

    class Way:
        def __init__(self):
            if made:
                raise DeviceError("no memory for the buffers")
            made.append(self)

        def close(self):
            made.append("closed")

    with pytest.raises(DeviceError, match="no memory"):
        BothWays(Way)
    assert made[1:] == ["closed"]


def test_a_path_can_be_forced(monkeypatch):
    monkeypatch.delenv("LMCACHE_COPY_PATH", raising=False)
    assert forced_path() == ""
    monkeypatch.setenv("LMCACHE_COPY_PATH", "kernel")
    paths = Paths({"store": {1: "staged"}, "load": {1: "staged"}}, forced_path())
    assert {paths.choose(n, to_slab=way) for n in (1, 1 << 20) for way in (True, False)} == {
        "kernel"
    }
    monkeypatch.setenv("LMCACHE_COPY_PATH", "fast")
    with pytest.raises(ConfigError, match="'fast', expected one of direct, staged, kernel"):
        forced_path()


def test_pages_that_are_not_there(slab, pins_of):
    pool = POOLS["layers"]
    planner = Planner(pool.layout)
    pages = pages_on(LazyDevice(planner, 0), slab, pool, pins_of(Registrar()), "staged")
    with pytest.raises(IndexError, match="page ids 99..99; the engine has 11"):
        pages.copy([Span(0, 1, 0, [99])], None, to_slab=True)
    assert pages.copy([Span(0, 1, 0, [])], None, to_slab=True) == 0
    pages.close()


def test_after_an_error_no_copy_is_under_way(slab, pins_of, monkeypatch):
    """A driver that copies run by run may have begun some of them."""
    pool = POOLS["layers"]
    device = LazyDevice(Planner(pool.layout), 0)
    pages = pages_on(device, slab, pool, pins_of(Registrar()), "direct")
    stream, copy = pages._stream, pages._stream.copy

    def fails(target, source, length, *, stays):
        copy(target[:1], source[:1], length[:1], stays=stays)
        raise DeviceError("lost")

    monkeypatch.setattr(stream, "copy", fails)
    monkeypatch.setattr(device, "maybe_run", lambda: None)
    with pytest.raises(DeviceError, match="lost"):
        pages.copy(spans_of(pool.layout), None, to_slab=True)
    assert not stream.queue
    pages.close()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("to_slab", [True, False])
def test_what_is_copied_stays_pinned_until_it_is(slab, monkeypatch, path, to_slab):
    pool = POOLS["layers"]
    device, copied = LazyDevice(Planner(pool.layout), 0), []
    monkeypatch.setattr(device, "maybe_run", lambda: None)

    class Held:
        @contextmanager
        def held(self):
            yield np.array([SLAB], np.int64)
            assert not any(stream.queue for stream in device.streams)
            copied.extend(device.copied)

    pages = pages_on(device, slab, pool, Held(), path)
    pages.copy(spans_of(pool.layout), None, to_slab=to_slab)
    assert copied
    assert len(copied) == len(device.copied)
    pages.close()


# ---- what is pinned


def test_the_slab_is_pinned_piece_by_piece(slab, pins_of):
    registrar = Registrar()
    pins = pins_of(registrar)
    with pins.held() as ends:
        assert ends.tolist() == [8192, 24576, 57344, 65536]
    starts = [0, 8192, 24576, 57344]
    sizes = [8192, 16384, 32768, 8192]
    assert registrar.pieces == [
        (slab.address + start, size) for start, size in zip(starts, sizes, strict=True)
    ]
    pins.close()
    assert not registrar.pieces
    with pins.held() as ends:
        assert not len(ends)


def test_serving_goes_on_while_memory_is_being_pinned(slab, pins_of):
    registrar = Registrar()
    registrar.may_go_on.clear()
    pins = pins_of(registrar, wait=False)
    with pins.held() as ends:
        assert not len(ends)
    registrar.may_go_on.set()
    pins._thread.join(5)
    with pins.held() as ends:
        assert ends[-1] == SLAB


def test_a_limit_means_nothing_stays_pinned_and_one_warning(slab, pins_of, caplog):
    registrar = Registrar(room=30_000)
    with caplog.at_level("WARNING", "lmcache"):
        pins = pins_of(registrar)
    assert not registrar.pieces
    with pins.held() as ends:
        assert not len(ends)
    [record] = caplog.records
    for word in ("cannot be pinned", "out of memory", "ulimit -l", "RLIMIT_MEMLOCK"):
        assert word in record.getMessage()


def test_memory_stays_pinned_while_it_is_copied(slab, pins_of):
    registrar = Registrar()
    pins = pins_of(registrar)
    closing = threading.Thread(target=pins.close)
    with pins.held():
        closing.start()
        closing.join(0.2)
        assert closing.is_alive()
        assert len(registrar.pieces) == 4
        with pins.held() as late:
            assert not len(late), "nobody comes in any more"
    closing.join(5)
    assert not registrar.pieces


def test_a_slab_is_pinned_once_whoever_copies_and_let_go_before_it_is_unmapped(caplog):
    slab = Slab.create(SLAB)
    first, second = Registrar(), Registrar()
    pins = pinning.pins_of(slab, first)
    pins._thread.join(5)
    assert pinning.pins_of(slab.lend(), second) is pins
    assert not second.pieces
    let_go = threading.Thread(target=slab.close)
    with pins.held() as ends:
        assert ends.tolist() == [SLAB]
        let_go.start()
        let_go.join(0.2)
        assert first.pieces == [(slab.address, SLAB)]
        assert slab.view[0] == 0, "it is still mapped"
    let_go.join(5)
    assert not first.pieces
    with pytest.raises(ValueError, match="released"):
        slab.view[0]
    assert not caplog.records


def test_another_slab_at_the_same_address_is_pinned_anew():
    slab = Slab.create(SLAB)
    pinning.pins_of(slab, Registrar())
    slab.close()
    again, registrar = Slab.create(SLAB), Registrar()
    again.address = slab.address
    pinning.pins_of(again, registrar)._thread.join(5)
    assert registrar.pieces == [(slab.address, SLAB)]
    again.close()
    assert not registrar.pieces


class OneByOne(Registrar):
    """Each piece has to be let through."""

    def __init__(self, room=1 << 60):
        super().__init__(room)
        self.turns, self.asked = threading.Semaphore(0), 0

    def register(self, address, size):
        self.asked += 1
        assert self.turns.acquire(timeout=5)
        super().register(address, size)


def test_closing_waits_for_the_piece_at_hand_and_begins_no_other(pins_of):
    registrar = OneByOne()
    pins = pins_of(registrar, wait=False)
    closing = threading.Thread(target=pins.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    registrar.turns.release(4)
    closing.join(5)
    assert registrar.asked == 1
    assert not registrar.pieces


def test_what_is_pinned_already_stays_so_while_it_is_copied_whatever_fails(pins_of):
    registrar = OneByOne(room=10_000)
    pins = pins_of(registrar, wait=False)
    registrar.turns.release()
    deadline = time.monotonic() + 5
    while registrar.asked < 2:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    with pins.held() as ends:
        assert ends.tolist() == [8192]
        registrar.turns.release()
        pins._thread.join(0.2)
        assert len(registrar.pieces) == 1
    pins._thread.join(5)
    assert not registrar.pieces


def test_two_that_come_at_once_share_what_is_pinned(slab, monkeypatch):
    made = []

    class Slow:
        def __init__(self, slab, registrar):
            time.sleep(0.05)
            made.append(self)

        def close(self):
            made.append("closed")

    monkeypatch.setattr(pinning, "Pins", Slow)
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(pinning.pins_of, slab, None) for _ in range(2)]
        assert {pins.result() for pins in found} == {made[0]}
    slab.close()
    assert made[1:] == ["closed"]


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, 100, True),
        (50, 50, True),
        (50, 51, False),
        (100, 200, True),
        (299, 1, True),
        (299, 2, False),
        (300, 1, False),
    ],
)
def test_no_copy_crosses_into_another_piece(start, length, expected):
    ends = np.array([100, 300], np.int64)
    assert are_held(ends, np.array([start]), np.array([length])) is expected
    assert are_held(ends, np.array([0, start]), np.array([1, length])) is expected
    assert not are_held(ends[:0], np.array([start]), np.array([length]))


# ---- which path


def test_the_path_is_that_of_the_next_shorter_run():
    paths = Paths({"store": {2048: "staged", 65536: "direct"}, "load": {2048: "kernel"}})
    chosen = [paths.choose(n, to_slab=True) for n in (1, 2048, 65535, 65536, 1 << 30)]
    assert chosen == ["staged", "staged", "staged", "direct", "direct"]
    assert {paths.choose(n, to_slab=False) for n in (1, 1 << 30)} == {"kernel"}
