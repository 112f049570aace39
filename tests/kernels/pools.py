"""The memory of engines, position-coded, and what an object of some of its pages must hold."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from lmcache.core.layout import PageLayout, region_of

PAGES = 11
"""Odd, and more than any object here has."""


@dataclass
class Pool:
    """The tensors of an engine, and our description of them."""

    name: str
    memory: torch.Tensor
    """All of it, whatever lies between the pages included."""
    tensors: list[torch.Tensor]
    page_axis: int
    blocks: int
    """Of the tensors, in one page."""
    layout: PageLayout

    def fill(self):
        """Every eight bytes say where they are."""
        whole = self.memory.numel() // 8 * 8
        self.memory[:whole].view(torch.int64).copy_(torch.arange(whole // 8))

    def object(self, pages):
        """The bytes of an object of `pages`, by indexing: no address is computed."""
        shares = [[self._share(tensor, page) for page in pages] for tensor in self.tensors]
        if self.layout.page_major:
            shares = list(zip(*shares, strict=True))
        return torch.cat([share for row in shares for share in row])

    def _share(self, tensor, page):
        block = tensor.movedim(self.page_axis, 0)[page * self.blocks : (page + 1) * self.blocks]
        order = sorted(range(block.dim()), key=lambda axis: -block.stride(axis))
        return block.permute(order).contiguous().reshape(-1).view(torch.uint8)


def pool(name, dtype, views, *, page_axis=0, blocks=1):
    """Tensors over one piece of memory; `views` are (offset, shape, strides) in elements."""
    size = torch.empty((), dtype=dtype).element_size()
    end = max(
        offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
        for offset, shape, strides in views
    )
    memory = torch.zeros(-(-end * size // 16) * 16 + 16, dtype=torch.uint8)
    flat = memory[: end * size].view(dtype)
    tensors = [flat.as_strided(shape, strides, offset) for offset, shape, strides in views]
    regions = [
        region_of(
            f"{name}.{index}",
            tensor.data_ptr(),
            tensor.shape,
            tensor.stride(),
            itemsize=size,
            dtype=str(dtype),
            page_axis=page_axis,
            blocks_per_page=blocks,
        )
        for index, tensor in enumerate(tensors)
    ]
    made = Pool(name, memory, tensors, page_axis, blocks, PageLayout(tuple(regions), 16, name))
    made.fill()
    return made


def contiguous(shape):
    strides = [1]
    for count in reversed(shape[1:]):
        strides.insert(0, strides[0] * count)
    return strides


AXES = "LBHNC"
VLLM_ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")


def vllm(order, dtype, heads, tokens, head_size=16, layers=2, padding=0):
    """vLLM 0.29 and later: K and V packed into the last axis, six orders of memory.

    With `padding`, so many elements follow what lies inside a page.
    """
    count = {"L": layers, "B": PAGES, "H": heads, "N": tokens, "C": 2 * head_size}
    stride, extent = {}, 1
    for axis in reversed(order):
        stride[axis] = extent = extent + padding * (axis == "B")
        extent *= count[axis]
    views = [
        (layer * stride["L"], [count[a] for a in AXES[1:]], [stride[a] for a in AXES[1:]])
        for layer in range(layers)
    ]
    return pool("vllm", dtype, views)


def split(kv_first, hnd, dtype, heads, tokens, head_size=16, layers=2):
    """Older vLLM: K and V are an axis of their own, before or after that of blocks."""
    inner = [heads, tokens, head_size] if hnd else [tokens, heads, head_size]
    shape = [2, PAGES, *inner] if kv_first else [PAGES, 2, *inner]
    strides = contiguous(shape)
    if hnd:  # the logical order stays, the strides are swapped
        shape[2], shape[3], strides[2], strides[3] = shape[3], shape[2], strides[3], strides[2]
    size = 2 * PAGES * heads * tokens * head_size
    views = [(layer * size, shape, strides) for layer in range(layers)]
    name = (
        f"split-{'2B' if kv_first else 'B2'}-{'hnd' if hnd else 'nhd'}-{dtype}-h{heads}-n{tokens}"
    )
    return pool(name, dtype, views, page_axis=int(kv_first))


def mla(dtype, tokens, latent=36, layers=3, padding=0):
    """One latent for a token, whose 36 or 72 bytes no wide word divides; pages may be padded."""
    stride = tokens * latent + padding
    views = [
        (layer * PAGES * stride, [PAGES, tokens, latent], [stride, latent, 1])
        for layer in range(layers)
    ]
    return pool("mla", dtype, views)


def kernel_blocks(dtype, ratio, tokens=4, heads=2, head_size=8):
    """A page of the manager's is several blocks of the kernel's."""
    shape = [PAGES * ratio, heads, tokens, 2 * head_size]
    size = PAGES * ratio * heads * tokens * 2 * head_size
    views = [(layer * size, shape, contiguous(shape)) for layer in range(2)]
    return pool("kernel blocks", dtype, views, blocks=ratio)


def sglang(dtype, heads, page_tokens, head_size=16, layers=2):
    """A K and a V pool for each layer, counted in tokens."""
    shape = [PAGES * page_tokens, heads, head_size]
    size = PAGES * page_tokens * heads * head_size
    views = [(index * size, shape, contiguous(shape)) for index in range(2 * layers)]
    return pool("sglang", dtype, views, blocks=page_tokens)


def trtllm(dtype, kv, layers=3, flat=96):
    """One pool of [blocks, layers, kv, flat]."""
    shape = [PAGES, layers, kv, flat]
    return pool("trtllm", dtype, [(0, shape, contiguous(shape))])


def trtllm_by_layer(dtype, layers=3, flat=96):
    """The same pool, described layer by layer."""
    shape, inner = [PAGES, 2, flat], 2 * flat
    views = [(layer * inner, shape, [layers * inner, flat, 1]) for layer in range(layers)]
    return pool("trtllm", dtype, views)


BF16, FP8, U8 = torch.bfloat16, torch.float8_e4m3fn, torch.uint8


def all_pools():
    """Constructors, by name: the matrix every copy path is tested with."""
    made = {}

    def add(make, *arguments, **keywords):
        text = [make.__name__, *(str(a).removeprefix("torch.") for a in arguments)]
        made["-".join([*text, *(f"{k}{v}" for k, v in keywords.items())])] = lambda: make(
            *arguments, **keywords
        )

    for order in VLLM_ORDERS:
        for heads, tokens in product((1, 2, 8, 32), (1, 16, 32, 64, 128)):
            add(vllm, order, BF16, heads, tokens, head_size=2 if heads * tokens > 256 else 16)
        add(vllm, order, FP8, 2, 16)
        add(vllm, order, U8, 1, 16, head_size=5)
    for kv_first, hnd, heads in product((False, True), (False, True), (1, 8)):
        add(split, kv_first, hnd, BF16, heads, 16)
        add(split, kv_first, hnd, FP8, heads, 32)
    for dtype, tokens in product((BF16, FP8), (1, 16, 64)):
        add(mla, dtype, tokens)
        add(mla, dtype, tokens, padding=28)
    add(mla, U8, 3, latent=7, padding=1)
    for ratio in (2, 4):
        add(kernel_blocks, BF16, ratio)
    for heads, page_tokens in product((1, 2, 8), (1, 16)):
        add(sglang, BF16, heads, page_tokens)
        add(sglang, FP8, heads, page_tokens)
    for kv in (1, 2):
        add(trtllm, BF16, kv)
        add(trtllm, FP8, kv)
    add(trtllm_by_layer, BF16)
    return made
