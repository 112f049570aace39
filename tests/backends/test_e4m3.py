"""Against torch, which has the type."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcache.backends.e4m3 import BLOCK, DTYPES, pack, packed_size, unpack_into

TYPES = [pytest.param(dtype, id=dtype) for dtype in DTYPES]


def bytes_of(tensor):
    return memoryview(tensor.contiguous().view(torch.uint8).numpy())


def through(tensor, dtype):
    """What comes back, and the packed bytes."""
    data = bytes_of(tensor)
    packed = memoryview(b"".join(pack(data, dtype)))
    assert len(packed) == packed_size(len(data), dtype)
    out = bytearray(len(data))
    unpack_into(packed, memoryview(out), dtype)
    return torch.frombuffer(out, dtype=tensor.dtype), packed


def expected(tensor):
    """Torch's own rounding, with the scale that the module promises."""
    blocks = tensor.double().view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    scale = 2.0 ** torch.ceil(torch.log2(largest.clamp(min=1e-30) / 448))
    scale = torch.where(largest / scale > 448, scale * 2, scale)
    return ((blocks / scale).float().to(torch.float8_e4m3fn).double() * scale).to(tensor.dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("spread", [0.1, 1, 5])
def test_it_rounds_as_torch_does(dtype, spread):
    torch.manual_seed(0)
    sizes = torch.randn(1000 * BLOCK) * torch.randn(1000 * BLOCK).mul(spread).exp()
    numbers = sizes.clamp(-60000, 60000).to(getattr(torch, dtype))
    back, _ = through(numbers, dtype)
    assert torch.equal(back, expected(numbers).view(-1))


def test_every_bfloat16_that_is_a_number_comes_back_close():
    """Next to itself, each is the largest of its block."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    every = every[every.isfinite() & (every.abs() > 1e-30)]
    back, _ = through(every.repeat_interleave(BLOCK), "bfloat16")
    largest = torch.finfo(torch.bfloat16).max
    want = every.double()
    got = back.view(-1, BLOCK)[:, 0].double()
    assert ((got - want).abs() <= want.abs() / 16).all()
    assert got.abs().max() <= largest


@pytest.mark.parametrize("dtype", TYPES)
def test_the_error_is_bounded(dtype):
    torch.manual_seed(1)
    numbers = (torch.randn(1000 * BLOCK) ** 3).to(getattr(torch, dtype))
    back, _ = through(numbers, dtype)
    want, got = numbers.double().view(-1, BLOCK), back.double().view(-1, BLOCK)
    largest = want.abs().amax(1, keepdim=True)
    bound = torch.maximum(want.abs() / 17, largest / 229_000)
    assert ((got - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_what_went_through_once_goes_through_unchanged(dtype):
    torch.manual_seed(2)
    numbers = (torch.randn(100 * BLOCK) * 30).to(getattr(torch, dtype))
    once, _ = through(numbers, dtype)
    twice, _ = through(once, dtype)
    assert torch.equal(once, twice)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("which", ["inf", "-inf", "nan"])
def test_what_is_not_finite_is_not_packed(dtype, which):
    numbers = torch.ones(3 * BLOCK, dtype=getattr(torch, dtype))
    assert pack(bytes_of(numbers), dtype) is not None
    numbers[BLOCK + 7] = float(which)
    assert pack(bytes_of(numbers), dtype) is None


def test_a_nan_of_low_bits_only_is_one():
    numbers = np.ones(BLOCK, np.uint32)
    numbers[3] = 0x7F800001
    assert pack(memoryview(numbers.tobytes()), "float32") is None


@pytest.mark.parametrize("dtype", TYPES)
def test_the_largest_stay_finite(dtype):
    kind = getattr(torch, dtype)
    numbers = torch.full((BLOCK,), torch.finfo(kind).max, dtype=kind)
    back, _ = through(numbers, dtype)
    assert back.isfinite().all()
    assert torch.allclose(back.double(), numbers.double(), rtol=1 / 16)


@pytest.mark.parametrize("dtype", TYPES)
def test_zeros_stay_zeros_with_their_signs(dtype):
    numbers = torch.zeros(BLOCK, dtype=getattr(torch, dtype))
    numbers[::2] = -0.0
    back, _ = through(numbers, dtype)
    assert bytes_of(back) == bytes_of(numbers)


@given(st.integers(0, 3 * 4 * BLOCK), st.sampled_from(sorted(DTYPES)))
def test_what_makes_no_whole_block_is_kept_as_it_is(size, dtype):
    data = memoryview(bytes([0x3C]) * size)
    packed = memoryview(b"".join(pack(data, dtype)))
    out = bytearray(size)
    unpack_into(packed, memoryview(out), dtype)
    rest = size % (BLOCK * DTYPES[dtype].itemsize)
    assert out[size - rest :] == data[size - rest :]
    assert len(packed) == packed_size(size, dtype)
