"""The kernels as they are compiled, and every path between a GPU and the slab."""

from __future__ import annotations

import logging

import numpy as np
import pools
import pytest
import torch

from lmcache import c_ops
from lmcache.core.errors import DeviceError
from lmcache.core.kernels.paths import PATHS
from lmcache.core.kernels.plan import Planner, Span
from lmcache.core.slab import Slab

POISON = 0xA5
PAGES = [7, 2, 3, 10, 0]
POOLS = pools.all_pools()
SOME = [name for index, name in enumerate(POOLS) if index % 9 == 0]
SLEEP = 200_000_000
"""Cycles: a tenth of a second."""
STREAMS = 8
"""Of torch's, some may share a queue with ours: then they wait though nobody asked them to."""


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def slab():
    made = Slab.create(8 << 20)
    yield made
    made.close()


def forced(pages, path):
    """Have it take one path, and wait until the slab is pinned."""
    pages.paths.forced = path
    pages._pins._thread.join(30)
    with pages._pins.held() as ends:
        assert ends.tolist() == [pages._pins._slab.size]
    return pages


@pytest.fixture
def pages_on(slab, device):
    from lmcache.core.kernels.cuda import CudaPages

    made = []

    def build(layout, path):
        made.append(CudaPages(layout, Planner(layout), slab, device, 2))
        return forced(made[-1], path)

    yield build
    for pages in made:
        pages.close()


@pytest.mark.parametrize("name", POOLS)
def test_kernels_copy_every_layout(name, on_gpu, device):
    from lmcache.core.kernels.scattered import copy_runs

    pool = on_gpu(POOLS[name]())
    expected = pool.object(PAGES)
    for shift in (0, 8, 1):
        memory = torch.full((len(expected) + 64,), POISON, dtype=torch.uint8, device=device)
        stored = memory[shift : shift + len(expected)]
        c_ops.gather(pool.layout, PAGES, stored)
        assert torch.equal(stored.cpu(), expected)
        assert (memory[:shift] == POISON).all()
        assert (memory[shift + len(expected) :] == POISON).all()
        pool.memory.fill_(POISON)
        c_ops.scatter(pool.layout, PAGES, stored)
        assert torch.equal(pool.object(PAGES), expected)
        others = [page for page in range(pools.PAGES) if page not in PAGES]
        assert (pool.object(others) == POISON).all()
        pool.fill()
    memory.fill_(POISON)
    runs = Planner(pool.layout).plan([Span(memory.data_ptr(), len(PAGES), 0, PAGES)])
    copy_runs(runs.stored, runs.engine, runs.length, device)
    assert torch.equal(memory[: len(expected)].cpu(), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SOME)
def test_every_path_copies_the_same(name, path, on_gpu, slab, pages_on):
    pool = on_gpu(POOLS[name]())
    expected = pool.object(PAGES)
    copies = pages_on(pool.layout, path)
    spans = [Span(4096, len(PAGES), 0, PAGES)]
    slab.view[:] = bytes([POISON]) * slab.size
    assert copies.copy(spans, None, to_slab=True) == len(expected)
    assert bytes(slab.view[4096 : 4096 + len(expected)]) == expected.numpy().tobytes()
    assert bytes(slab.view[:4096]) == bytes([POISON]) * 4096
    pool.memory.fill_(POISON)
    copies.copy(spans, None, to_slab=False)
    assert torch.equal(pool.object(PAGES), expected)
    others = [page for page in range(pools.PAGES) if page not in PAGES]
    assert (pool.object(others) == POISON).all()


@pytest.mark.parametrize("path", PATHS)
def test_a_store_waits_for_the_forward(path, on_gpu, slab, pages_on):
    pool = on_gpu(POOLS["vllm-LBHNC-bfloat16-8-16-head_size16"]())
    copies = pages_on(pool.layout, path)
    spans = [Span(0, len(PAGES), 0, PAGES)]
    final = pool.memory.clone()
    expected = pool.object(PAGES).numpy().tobytes()

    def arrives(*, waits):
        pool.memory.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(SLEEP)
            pool.memory.copy_(final)
            written = torch.cuda.Event()
            written.record()
        copies.copy(spans, None, to_slab=True, after=written if waits else None)
        arrived = bytes(slab.view[: len(expected)]) == expected
        torch.cuda.synchronize()
        return arrived

    assert arrives(waits=True)
    assert not all(arrives(waits=False) for _ in range(STREAMS)), "without it pages are empty"


@pytest.mark.parametrize("path", PATHS)
def test_a_load_waits_until_its_pages_have_been_cleared(path, on_gpu, slab, pages_on):
    pool = on_gpu(POOLS["vllm-LBHNC-bfloat16-8-16-head_size16"]())
    copies = pages_on(pool.layout, path)
    spans = [Span(0, len(PAGES), 0, PAGES)]
    expected = pool.object(PAGES)
    copies.copy(spans, None, to_slab=True)

    def arrives(*, waits):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(SLEEP)
            pool.memory.zero_()
            cleared = torch.cuda.Event()
            cleared.record()
        copies.copy(spans, None, to_slab=False, after=cleared if waits else None)
        torch.cuda.synchronize()
        return torch.equal(pool.object(PAGES), expected)

    assert arrives(waits=True)
    assert not all(arrives(waits=False) for _ in range(STREAMS)), "without it pages are cleared"


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lmcache"), "propagate", True)
    caplog.set_level("WARNING", "lmcache")
    return caplog


def test_what_is_not_pinned_goes_through_a_small_buffer(
    on_gpu, slab, device, monkeypatch, warnings
):
    from lmcache.core.kernels.cuda import CudaPages, _Registrar

    def full(self, address, size):
        raise DeviceError("cuMemHostRegister failed with 2: out of memory")

    monkeypatch.setattr(_Registrar, "register", full)
    pool = on_gpu(POOLS["sglang-bfloat16-8-16"]())
    copies = CudaPages(pool.layout, Planner(pool.layout), slab, device, 2)
    copies._pins._thread.join(5)
    assert "cannot be pinned" in warnings.text
    expected = pool.object(PAGES)
    spans = [Span(12345, len(PAGES), 0, PAGES)]
    for path in PATHS:
        copies.paths.forced = path
        slab.view[:] = bytes(slab.size)
        copies.copy(spans, None, to_slab=True)
        assert bytes(slab.view[12345 : 12345 + len(expected)]) == expected.numpy().tobytes()
        pool.memory.zero_()
        copies.copy(spans, None, to_slab=False)
        assert torch.equal(pool.object(PAGES), expected)
    copies.close()


def test_the_slab_is_pinned_and_let_go(slab, device):
    from lmcache.core.kernels.cuda import _Registrar
    from lmcache.core.kernels.driver import Driver
    from lmcache.core.kernels.pinning import Pins

    driver = Driver()
    driver.bind(device.index)
    pins = Pins(slab, _Registrar(driver, device.index))
    pins._thread.join(30)
    with pins.held() as ends:
        assert ends.tolist() == [slab.size]
    assert driver.device_address(slab.address) == slab.address
    pins.close()
    driver.register(slab.address, slab.size)  # which nobody may who finds it pinned
    driver.unregister(slab.address)


def test_a_slab_is_pinned_once_for_all_who_copy(on_gpu, slab, pages_on, warnings):
    layout = on_gpu(POOLS["sglang-bfloat16-8-16"]()).layout
    one, other = pages_on(layout, "direct"), pages_on(layout, "kernel")
    one.close()
    with other._pins.held() as ends:
        assert ends.tolist() == [slab.size]
    assert not warnings.records


def test_memory_is_touched_next_to_the_device(on_gpu, pages_on, monkeypatch):
    from lmcache.core.kernels import cuda, nearby

    said = []
    monkeypatch.setattr(cuda, "stay_near", said.append)
    copies = pages_on(on_gpu(POOLS["sglang-bfloat16-8-16"]()).layout, "direct")
    copies.stay_near()
    assert set(said) == {said[-1]}
    assert (nearby.DEVICES / said[-1].lower() / "vendor").read_text() == "0x10de\n"


def test_fp8_is_what_torch_has(device):
    from lmcache.core.kernels import fp8

    source = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    target = torch.zeros(source.shape, dtype=torch.float8_e4m3fn, device=device)
    fp8.encode(source.to(device), target, 0.5)
    exact = source.float() / 0.5
    expected = exact.clamp(-448, 448).to(torch.float8_e4m3fn)
    number = ~exact.isnan()
    assert torch.equal(target.cpu().view(torch.uint8)[number], expected.view(torch.uint8)[number])
    back = torch.zeros(source.shape, dtype=torch.bfloat16, device=device)
    fp8.decode(target, back, 0.5)
    assert torch.equal(back.cpu()[number], (expected.float() * 0.5).to(torch.bfloat16)[number])


# ---- a small engine


HEADS, SIZE, TOKENS = 4, 64, 16


class Engine:
    """Paged attention over one layer, one token after the other."""

    def __init__(self, pages, device):
        self.cache = torch.zeros(pages, HEADS, TOKENS, 2 * SIZE, dtype=torch.float16, device=device)
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.randn(3, HEADS * SIZE, HEADS * SIZE, generator=generator).to(device)
        self.table = []

    def step(self, state, length):
        """Write the token's K and V, attend to all tokens so far; the next state."""
        q, k, v = (state @ weight / 16 for weight in self.weights)
        page, slot = self.table[length // TOKENS], length % TOKENS
        kv = torch.cat([k.view(HEADS, SIZE), v.view(HEADS, SIZE)], dim=-1)
        self.cache[page, :, slot] = kv.half()
        seen = self.cache[self.table].permute(1, 0, 2, 3).reshape(HEADS, -1, 2 * SIZE)
        keys, values = seen[:, : length + 1].float().split(SIZE, dim=-1)
        scores = torch.einsum("hd,htd->ht", q.view(HEADS, SIZE), keys) / SIZE**0.5
        mixed = torch.einsum("ht,htd->hd", scores.softmax(-1), values)
        return torch.tanh(mixed.reshape(-1) + state)


def decode(device, offload, steps=100):
    """All states; before some steps, the whole cache goes out and comes back to other pages."""
    engine = Engine(32, device)
    state = torch.linspace(-1, 1, HEADS * SIZE, device=device)
    states = []
    for length in range(steps):
        if length % TOKENS == 0:
            engine.table.append(next(p for p in range(31, 0, -1) if p not in engine.table))
        if offload and length % 13 == 5:
            offload(engine)
        state = engine.step(state, length)
        states.append(state.clone())
    return torch.stack(states).cpu()


@pytest.mark.parametrize("path", PATHS)
def test_decoding_is_the_same_bit_for_bit_with_offload(path, slab, pages_on, device):
    from lmcache.core.layout import PageLayout, region_of

    rng = np.random.default_rng(0)

    def offload(engine):
        cache = engine.cache
        region = region_of(
            "cache",
            cache.data_ptr(),
            cache.shape,
            cache.stride(),
            itemsize=2,
            dtype="float16",
            page_axis=0,
        )
        copies = pages_on(PageLayout((region,), TOKENS, "engine"), path)
        forward = torch.cuda.Event()
        forward.record()
        count = len(engine.table)
        copies.copy([Span(0, count, 0, engine.table)], None, to_slab=True, after=forward)
        cache.fill_(float("nan"))
        engine.table = rng.permutation(np.arange(1, 32))[:count].tolist()
        forward.record()
        copies.copy([Span(0, count, 0, engine.table)], None, to_slab=False, after=forward)

    assert torch.equal(decode(device, offload), decode(device, None))
