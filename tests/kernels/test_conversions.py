"""What one engine stored, in another's order or in half the bytes."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pools
import pytest
import torch

from lmcache.core.errors import LayoutError
from lmcache.core.kernels.convert import Rows, reordered
from lmcache.core.kernels.plan import Planner, Span

CPU = torch.device("cpu")
ORDERS = list(permutations(("kv", "head", "token")))
HEADS, TOKENS, SIZE = 3, 4, 8
ROWS = Rows(kv=2, head=HEADS, token=TOKENS, row_bytes=2 * SIZE)
PAGES = [7, 2, 10, 0]


def pool_in(order, padding=0):
    """Two layers whose pages count rows in this order."""
    count = {"kv": 2, "head": HEADS, "token": TOKENS}
    shape = [pools.PAGES, *(count[axis] for axis in order), SIZE]
    strides = pools.contiguous(shape)
    strides[0] += padding
    views = [(layer * strides[0] * pools.PAGES, shape, strides) for layer in range(2)]
    return pools.pool("rows", torch.bfloat16, views)


def object_of(pool, order, wanted, pages):
    """By permuting axes: the pool's pages in another order."""
    to = [0, *(1 + order.index(axis) for axis in wanted), 4]
    layers = [tensor[pages].permute(to).contiguous().view(torch.uint8) for tensor in pool.tensors]
    return torch.cat([layer.reshape(-1) for layer in layers])


@pytest.mark.parametrize(("source", "target"), list(product(ORDERS, ORDERS)))
@pytest.mark.parametrize("padding", [0, 8])
def test_an_object_in_another_order(interpreted, source, target, padding):
    pool = pool_in(source, padding)
    [shape] = Planner(pool.layout).shapes
    other = reordered(shape, ROWS, source, target)
    expected = object_of(pool, source, target, PAGES)
    stored = torch.zeros_like(expected)
    pages = Planner(pool.layout).pages([Span(stored.data_ptr(), len(PAGES), 0, PAGES)])
    kernel = interpreted.paged.PagedKernel(other, CPU)
    kernel.launch(pages, to_stored=True)
    assert torch.equal(stored, expected)
    before = pool.memory.clone()
    for tensor in pool.tensors:
        tensor[PAGES] = 0
    kernel.launch(pages, to_stored=False)
    assert torch.equal(pool.memory, before)


def test_what_two_engines_share(interpreted):
    """One has K and V apart, token by token; the other has them side by side, head by head."""
    apart, packed = ("kv", "token", "head"), ("head", "token", "kv")
    ours, theirs = pool_in(apart), pool_in(packed)
    expected = object_of(theirs, packed, packed, PAGES)
    [shape] = Planner(ours.layout).shapes
    kernel = interpreted.paged.PagedKernel(reordered(shape, ROWS, apart, packed), CPU)
    pages = Planner(ours.layout).pages([Span(expected.data_ptr(), len(PAGES), 0, PAGES)])
    kernel.launch(pages, to_stored=False)
    for mine, their in zip(ours.tensors, theirs.tensors, strict=True):
        assert torch.equal(mine[PAGES], their[PAGES].permute(0, 3, 2, 1, 4))


def test_what_stays_together_is_copied_together():
    [shape] = Planner(pool_in(("kv", "head", "token")).layout).shapes
    same = reordered(shape, ROWS, ("kv", "head", "token"), ("kv", "head", "token"))
    assert same.offsets.shape == (2, 1)
    assert same.run_bytes == shape.run_bytes
    blocks = reordered(shape, ROWS, ("kv", "head", "token"), ("head", "kv", "token"))
    assert blocks.run_bytes == TOKENS * 2 * SIZE


@pytest.mark.parametrize(
    ("rows", "source", "target", "message"),
    [
        (ROWS, ("kv", "head", "page"), ORDERS[0], "is no order"),
        (ROWS, ORDERS[0], ("kv", "kv", "token"), "is no order"),
        (Rows(2, HEADS, TOKENS, 2), ORDERS[0], ORDERS[1], "are not the 384 bytes of a page"),
        (Rows(2, 1, 1, 192), ORDERS[0], ORDERS[5], "cut rows of 192 apart"),
    ],
)
def test_what_cannot_be(rows, source, target, message):
    shape = [pools.PAGES, 24, SIZE]
    views = [(0, shape, [24 * 2 * SIZE, 2 * SIZE, 1])]
    gaps = pools.pool("gaps", torch.bfloat16, views)
    [found] = Planner(gaps.layout).shapes
    with pytest.raises(LayoutError, match=message):
        reordered(found, rows, source, target)


# ---- half the bytes


def every_bfloat16():
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


@pytest.mark.parametrize("scale", [1.0, 0.5, 3.0])
def test_every_number_is_rounded_as_torch_does(interpreted, scale):
    source = every_bfloat16()
    target = torch.zeros(source.shape, dtype=torch.float8_e4m3fn)
    with np.errstate(all="ignore"):  # NumPy warns of NaN and infinity, a GPU does not
        interpreted.fp8.encode(source, target, scale)
    exact = source.float() / scale
    expected = exact.clamp(-448, 448).to(torch.float8_e4m3fn)
    is_number = ~exact.isnan()
    assert torch.equal(target.view(torch.uint8)[is_number], expected.view(torch.uint8)[is_number])
    assert target.float()[~is_number].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_every_code_has_its_value(interpreted, dtype, scale):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    target = torch.zeros(256, dtype=dtype)
    interpreted.fp8.decode(codes, target, scale)
    expected = (codes.float() * scale).to(dtype)
    assert torch.equal(target.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(target[number], expected[number])
    assert (torch.signbit(target) == torch.signbit(expected))[number].all()


def test_float32_ties_and_neighbours(interpreted):
    codes = torch.arange(127, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (codes[1:] + codes[:-1]) / 2
    source = torch.cat(
        [middle, torch.nextafter(middle, middle + 1), torch.nextafter(middle, -middle)]
    )
    target = torch.zeros(source.shape, dtype=torch.float8_e4m3fn)
    interpreted.fp8.encode(source, target, 1.0)
    assert torch.equal(target.float(), source.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(
    ("source", "target", "scale", "message"),
    [
        (torch.zeros(4, dtype=torch.int8), torch.zeros(4).to(torch.float8_e4m3fn), 1, "int8"),
        (torch.zeros(4), torch.zeros(4), 1, "no conversion between"),
        (torch.zeros(4), torch.zeros(5).to(torch.float8_e4m3fn), 1, "4 on cpu, 5 on cpu"),
        (torch.zeros(4, 2).T, torch.zeros(8).to(torch.float8_e4m3fn), 1, "not contiguous"),
        (torch.zeros(4), torch.zeros(4).to(torch.float8_e4m3fn), 0.0, "scale 0.0 is not positive"),
        (torch.zeros(4), torch.zeros(4).to(torch.float8_e4m3fn), np.nan, "scale nan"),
    ],
)
def test_what_cannot_be_encoded(interpreted, source, target, scale, message):
    with pytest.raises(ValueError, match=message):
        interpreted.fp8.encode(source, target, scale)
