"""Every layout of every engine, through the planner and back: heads, page sizes, dtypes.

What is expected comes from indexing tensors; no address is computed for it. The kernels, which
take their addresses from the same shapes, have a smaller matrix: they are interpreted.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pools
import pytest
import torch

from lmcache.core.kernels.host import HostCopier
from lmcache.core.kernels.plan import Planner, Span

POISON = 0xA5
DTYPES = {"bf16": pools.BF16, "fp8": pools.FP8, "uint8": pools.U8}
HEADS = (1, 2, 8, 32)
TOKENS = (1, 16, 32, 64, 128)
PARTS = [(5, 0, [7, 2, 3, 10, 0]), (3, 1, [8]), (7, 2, [1, 9, 5])]
"""Objects of odd numbers of pages: all of one, and the middle of others."""


def packed(order, padding=0):
    def make(dtype, heads, tokens):
        return pools.vllm(order, dtype, heads, tokens, head_size=4, padding=padding)

    return make


def split(kv_first, hnd):
    def make(dtype, heads, tokens):
        return pools.split(kv_first, hnd, dtype, heads, tokens, head_size=8)

    return make


def kernel_blocks(ratio):
    def make(dtype, heads, tokens):
        return pools.kernel_blocks(dtype, ratio, tokens=tokens, heads=heads, head_size=4)

    return make


def sglang(dtype, heads, tokens):
    return pools.sglang(dtype, heads, tokens, head_size=8)


def trtllm(kv):
    def make(dtype, heads, tokens):
        return pools.trtllm(dtype, kv, flat=heads * tokens * 8)

    return make


def trtllm_by_layer(dtype, heads, tokens):
    return pools.trtllm_by_layer(dtype, flat=heads * tokens * 8)


FAMILIES = {
    **{f"vLLM {order}": packed(order) for order in pools.VLLM_ORDERS},
    **{f"vLLM {order}, padded": packed(order, 24) for order in ("LBHNC", "LBNHC", "BLHNC")},
    "K, then V, NHD": split(kv_first=True, hnd=False),
    "K, then V, HND": split(kv_first=True, hnd=True),
    "K and V apart in each page, NHD": split(kv_first=False, hnd=False),
    "K and V apart in each page, HND": split(kv_first=False, hnd=True),
    **{f"{ratio} kernel blocks": kernel_blocks(ratio) for ratio in (2, 4)},
    "SGLang": sglang,
    "TensorRT-LLM": trtllm(2),
    "TensorRT-LLM, latents": trtllm(1),
    "TensorRT-LLM, layer by layer": trtllm_by_layer,
}


@pytest.fixture(scope="module")
def copier():
    made = HostCopier(1)
    yield made
    made.close()


def there_and_back(pool, copier):
    planner, page_bytes = Planner(pool.layout), pool.layout.page_bytes
    memory = torch.full((sum(count for count, *_ in PARTS) * page_bytes,), POISON, dtype=pools.U8)
    spans, expected, at = [], memory.clone(), 0
    for count, first, pages in PARTS:
        spans.append(Span(memory.data_ptr() + at, count, first, pages))
        place(pool, expected[at : at + count * page_bytes], count, first, pages)
        at += count * page_bytes
    before = pool.memory.clone()
    runs = planner.plan(spans)
    copier.copy(runs.stored, runs.engine, runs.length)
    assert torch.equal(memory, expected)
    assert torch.equal(pool.memory, before), "a store changes no page"

    stored = [page for _, _, pages in PARTS for page in pages]
    others = [page for page in range(pools.PAGES) if page not in stored]
    content = pool.object(stored)
    pool.memory.fill_(POISON)
    copier.copy(runs.engine, runs.stored, runs.length)
    assert torch.equal(pool.object(stored), content)
    assert (pool.object(others) == POISON).all()


def place(pool, target, count, first, pages):
    """Put the bytes of some pages where they belong in an object of `count`."""
    ends = first + len(pages)
    if pool.layout.page_major:
        target.view(count, -1)[first:ends] = pool.object(pages).view(len(pages), -1)
        return
    own, at = 0, 0
    content = pool.object(pages)
    for region in pool.layout.regions:
        size = region.page_bytes
        share = content[own : own + len(pages) * size].view(len(pages), size)
        target[at : at + count * size].view(count, size)[first:ends] = share
        own, at = own + len(pages) * size, at + count * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layout(copier, name, dtype):
    for heads, tokens in product(HEADS, TOKENS):
        there_and_back(FAMILIES[name](DTYPES[dtype], heads, tokens), copier)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [0, 28])
def test_latents(copier, dtype, padding):
    for tokens in TOKENS:
        there_and_back(pools.mla(DTYPES[dtype], tokens, padding=padding), copier)
    if dtype == "uint8":
        there_and_back(pools.mla(pools.U8, 3, latent=7, padding=1), copier)


def test_padding_is_never_copied():
    for name in ("vLLM LBHNC, padded", "vLLM BLHNC, padded"):
        pool = FAMILIES[name](pools.BF16, 2, 16)
        runs = Planner(pool.layout).plan([Span(0, 3, 0, [4, 5, 6])])
        assert runs.total_bytes == 3 * pool.layout.page_bytes
        pages = np.sort(runs.engine)
        assert (np.diff(pages) > runs.length[:-1]).all(), "there is a gap after each page"
