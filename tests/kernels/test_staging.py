"""What is copied through buffers arrives whole, in whatever order a device does its work."""

from __future__ import annotations

import numpy as np
import pools
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lazy import LazyDevice

from lmcache.core.errors import DeviceError
from lmcache.core.kernels.host import HostCopier
from lmcache.core.kernels.plan import Planner, Span
from lmcache.core.kernels.staging import Staging
from lmcache.core.kernels.tiles import ALIGNMENT, Tiler

POISON = 0xA5
PINNED = {"pinned": [1 << 30], "unpinned": [], "in two pieces": [1000, 1 << 30], "half": [1000]}
POOLS = {
    "layers": pools.vllm("LBHNC", torch.uint8, 2, 4, layers=5),
    "blocks first": pools.vllm("BLHNC", torch.uint8, 2, 4, layers=3),
    "padded": pools.mla(torch.bfloat16, 4, padding=28),
    "tokens": pools.sglang(torch.bfloat16, 2, 4),
}
SPANS = [(5, 0, [7, 2, 3, 10, 0]), (4, 1, [1, 5]), (1, 0, [9]), (6, 0, [4, 6, 8])]


class House:
    """One pool, its slab, and a staging between them."""

    def __init__(self, pool, seed, pinned, tile_bytes):
        pool.fill()
        self.pool, self.layout = pool, pool.layout
        self.planner = Planner(self.layout)
        self.device = LazyDevice(self.planner, seed)
        self.tiler = Tiler(self.planner, self.layout, tile_bytes)
        self.slab = np.full(sum(n for n, _, _ in SPANS) * self.layout.page_bytes + 999, POISON)
        self.slab = self.slab.astype(np.uint8)
        self.host = HostCopier(1)
        self.staging = Staging(
            self.device,
            self.slab.ctypes.data,
            self.host,
            buffer_bytes=self.tiler.tile_bytes,
        )
        self.held = np.array(PINNED[pinned], np.int64)
        self.spans, at = [], 333
        for count, first, pages in SPANS:
            self.spans.append(Span(at, count, first, pages))
            at += count * self.layout.page_bytes

    def expected_slab(self, region=None):
        """By the planner's own runs, which its tests compare with something else."""
        wanted = np.full_like(self.slab, POISON)
        memory = self.pool.memory.numpy()
        runs = self.planner.plan(self.spans, region)
        base = self.pool.memory.data_ptr()
        for engine, stored, length in zip(runs.engine, runs.stored, runs.length, strict=True):
            wanted[stored : stored + length] = memory[engine - base : engine - base + length]
        return wanted

    def pages(self):
        return [page for _, _, pages in SPANS for page in pages]


@pytest.fixture
def house():
    made = []

    def build(*arguments):
        made.append(House(*arguments))
        return made[-1]

    yield build
    for one in made:
        one.host.close()
        one.pool.fill()


@pytest.mark.parametrize("region", [None, 1])
@pytest.mark.parametrize("tile_bytes", [1, 700, 1 << 20], ids=["tiny", "small", "one"])
@pytest.mark.parametrize("pinned", PINNED)
@pytest.mark.parametrize("name", POOLS)
def test_a_store_and_a_load(house, name, pinned, tile_bytes, region):
    for seed in range(8):
        at = house(POOLS[name], seed, pinned, tile_bytes)
        expected = at.expected_slab(region)
        for _ in range(2):
            at.staging.store(at.tiler.tiles(at.spans, region), at.held, None)
            assert (at.slab == expected).all()
        before = at.pool.memory.clone()
        for page in at.pages():
            for index, tensor in enumerate(at.pool.tensors):
                if region in (None, index):
                    rows = slice(page * at.pool.blocks, (page + 1) * at.pool.blocks)
                    tensor.movedim(at.pool.page_axis, 0)[rows].zero_()
        assert not torch.equal(at.pool.memory, before)
        at.staging.load(at.tiler.tiles(at.spans, region), at.held, None)
        assert torch.equal(at.pool.memory, before)


@pytest.mark.parametrize("pinned", PINNED)
def test_nothing_is_read_before_the_forward_has_written_it(house, pinned):
    for seed in range(20):
        at = house(POOLS["layers"], seed, pinned, 700)
        final = at.pool.memory.clone()
        at.pool.memory.fill_(0)
        forward = at.device.stream()
        forward.call(lambda at=at, final=final: at.pool.memory.copy_(final))
        written = forward.record()
        at.staging.store(at.tiler.tiles(at.spans), at.held, written)
        at.pool.memory.copy_(final)
        assert (at.slab == at.expected_slab()).all()


@pytest.mark.parametrize("pinned", PINNED)
def test_nothing_is_loaded_before_the_engine_has_cleared_its_pages(house, pinned):
    for seed in range(20):
        at = house(POOLS["layers"], seed, pinned, 700)
        expected = at.pool.memory.clone()
        at.staging.store(at.tiler.tiles(at.spans), at.held, None)
        forward = at.device.stream()

        def clear(at=at):
            for page in at.pages():
                for tensor in at.pool.tensors:
                    tensor[page].zero_()

        forward.call(clear)
        at.staging.load(at.tiler.tiles(at.spans), at.held, forward.record())
        assert torch.equal(at.pool.memory, expected)


def test_an_error_leaves_nothing_to_later_calls(house):
    """A slot whose store failed is another's when the next store comes."""
    at = house(POOLS["layers"], 0, "unpinned", 700)

    def breaks(tiles):
        for index, tile in enumerate(tiles):
            if index == 2:
                raise DeviceError("lost")
            yield tile

    with pytest.raises(DeviceError, match="lost"):
        at.staging.store(breaks(at.tiler.tiles(at.spans)), at.held, None)
    at.slab[:] = POISON
    at.staging.load([], at.held, None)
    at.staging.store([], at.held, None)
    assert (at.slab == POISON).all()
    at.staging.store(at.tiler.tiles(at.spans), at.held, None)
    assert (at.slab == at.expected_slab()).all()


@pytest.mark.parametrize("to_slab", [True, False])
def test_after_an_error_nothing_is_under_way(house, monkeypatch, to_slab):
    """Or it would land in pages or slots that are somebody else's by then."""
    at = house(POOLS["layers"], 0, "pinned", 700)
    monkeypatch.setattr(at.device, "maybe_run", lambda: None)

    def breaks(tiles):
        yield next(tiles)
        raise DeviceError("lost")

    move = at.staging.store if to_slab else at.staging.load
    with pytest.raises(DeviceError, match="lost"):
        move(breaks(at.tiler.tiles(at.spans)), at.held, None)
    assert at.device.copied
    assert not any(stream.queue for stream in at.device.streams)


@given(
    tile_bytes=st.integers(1, 1 << 16),
    spans=st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.integers(0, pools.PAGES - 1), max_size=7)),
        max_size=5,
    ),
    name=st.sampled_from(sorted(POOLS)),
)
@settings(max_examples=60)
def test_tiles_fit_and_cover_everything_once(tile_bytes, spans, name):
    layout = POOLS[name].layout
    planner = Planner(layout)
    tiler = Tiler(planner, layout, tile_bytes)
    asked = [
        Span(index << 30, first + len(pages) + 1, first, pages)
        for index, (first, pages) in enumerate(spans)
    ]
    covered = []
    for tile in tiler.tiles(asked):
        assert tile.size <= tiler.tile_bytes
        assert tile.size % ALIGNMENT == 0
        for buffer, stored, length in tile.extents:
            assert 0 <= buffer <= buffer + length <= tile.size
            covered.append((stored, stored + length))
    wanted = planner.plan(asked)
    stops = wanted.stored + wanted.length
    edges = list(zip(wanted.stored.tolist(), stops.tolist(), strict=True))
    assert _union(covered) == _union(edges)
    assert sum(b - a for a, b in covered) == wanted.total_bytes, "nothing is copied twice"


def _union(stretches):
    joined = []
    for start, stop in sorted(stretches):
        if joined and joined[-1][1] == start:
            joined[-1][1] = stop
        else:
            joined.append([start, stop])
    return joined
