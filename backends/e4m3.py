"""FP8 E4M3 with a scale for each block of numbers, in numpy.

    number = e4m3(code) * 2 ** (scale - 135)

The scale is the smallest with which no number of its block is over 448, the largest of E4M3. A
power of two costs no precision, and what has gone through once goes through again unchanged. Down
to a 14,000th of the largest number of its block, a number is off by at most 1/17 of itself; below,
by at most a 229,000th of the largest.

Inside, numbers are bfloat16, as the integers that their bits make; wider ones are cut to that, with
the last bit set if anything was cut off, so that everything rounds to the nearest, ties to even.

What is packed is the scale of each block (u8), the code of each number (u8), and the bytes after
the last whole block as they are.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Words = NDArray[np.uint16]
    Numbers = NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
"""What can be packed, by the names of torch."""
BLOCK = 128
"""Numbers that share a scale."""
_AT_ONCE = 512
"""Blocks converted at a time: they fit a processor's cache."""
_MANTISSA = 7
_INFINITE = 0x7F80
_LARGEST_HALF = 65504.0
_TOP = 135
"""The exponent of 448."""
_OVER = 0x1F
"""Carries into the exponent where the mantissa is over that of 448."""
_BINADES = 20
"""From the largest number of a block down to what surely rounds to zero."""


def pack(data: memoryview, dtype: str) -> list[memoryview] | None:
    """What makes up the packed numbers in `data`; None if one of them is not finite."""
    numbers, rest = _whole_blocks(data, dtype)
    scales = np.empty(numbers.size // BLOCK, np.uint8)
    codes = np.empty(numbers.size, np.uint8)
    for blocks, here in _pieces(scales.size):
        encoded = _encode(numbers[here])
        if encoded is None:
            return None
        scales[blocks], codes[here] = encoded
    return [scales.data, codes.data, rest]


def packed_size(size: int, dtype: str) -> int:
    """How many bytes `size` bytes of numbers make."""
    blocks, rest = divmod(size, BLOCK * DTYPES[dtype].itemsize)
    return blocks * (1 + BLOCK) + rest


def unpack_into(packed: memoryview, out: memoryview, dtype: str) -> None:
    """Fill `out` from `packed`, which has the size for it."""
    numbers, rest = _whole_blocks(out, dtype)
    count = numbers.size // BLOCK
    scales, codes = np.split(np.frombuffer(packed, np.uint8)[: count + numbers.size], [count])
    for blocks, here in _pieces(count):
        _decode_into(numbers[here], scales[blocks], codes[here])
    rest[:] = packed[count + numbers.size :]


def _whole_blocks(data: memoryview, dtype: str) -> tuple[Numbers, memoryview]:
    """The numbers of all whole blocks, and the bytes after them."""
    kind = DTYPES[dtype]
    size = len(data) - len(data) % (BLOCK * kind.itemsize)
    return np.frombuffer(data[:size], kind), data[size:]


def _pieces(count: int) -> Iterator[tuple[slice, slice]]:
    """Where the blocks of each piece are, and where their numbers."""
    for start in range(0, count, _AT_ONCE):
        stop = min(start + _AT_ONCE, count)
        yield slice(start, stop), slice(start * BLOCK, stop * BLOCK)


def _encode(numbers: Numbers) -> tuple[Bytes, Bytes] | None:
    """Scales and codes of whole blocks."""
    words = _narrow(numbers)
    sizes = (words & 0x7FFF).reshape(-1, BLOCK)
    largest = sizes.max(axis=1, keepdims=True)
    if (largest >= _INFINITE).any():
        return None
    scales = np.maximum((largest + _OVER) >> _MANTISSA, _BINADES)
    smallest = (scales - _BINADES) << _MANTISSA
    np.maximum(sizes, smallest, out=sizes)
    np.subtract(sizes, smallest, out=sizes)
    codes = np.take(_codes(), sizes.reshape(-1))
    codes |= ((words >> 8) & 0x80).astype(np.uint8)
    return scales.astype(np.uint8).reshape(-1), codes


def _decode_into(numbers: Numbers, scales: Bytes, codes: Bytes) -> None:
    index = (codes.reshape(-1, BLOCK) | (scales.astype(np.uint16) << 8)[:, None]).reshape(-1)
    if numbers.dtype == np.float16:
        np.copyto(numbers.view(np.uint16), np.take(_halves(), index))
    elif numbers.dtype == np.float32:
        np.left_shift(np.take(_words(), index), 16, out=numbers.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(numbers, np.take(_words(), index))


def _narrow(numbers: Numbers) -> Words:
    """bfloat16 as it is; float16 and float32 cut to it, with the last bit set for what was cut."""
    if numbers.dtype == np.float16:
        return np.take(_narrow_halves(), numbers.view(np.uint16))
    if numbers.dtype == np.float32:
        return _cut(numbers.view(np.uint32))
    return numbers


def _cut(bits: NDArray[np.uint32]) -> Words:
    words = (bits >> 16).astype(np.uint16)
    words |= (bits & 0xFFFF) != 0
    return words


@cache
def _narrow_halves() -> Words:
    """What is left of each float16."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    return _cut(halves.astype(np.float32).view(np.uint32))


@cache
def _values() -> NDArray[np.float32]:
    """What the codes without a sign mean. The last is NaN in E4M3; it is never written."""
    codes = np.arange(128)
    exponents, digits = codes >> 3, codes & 7
    normal = (8 + digits) * 2.0 ** (exponents - 10)
    return np.where(exponents, normal, digits * 2.0**-9).astype(np.float32)


@cache
def _codes() -> Bytes:
    """The code of each size, counted from the smallest of its block."""
    sizes = np.arange((_BINADES + 1) << _MANTISSA, dtype=np.uint32)
    values = ((sizes + ((_TOP - _BINADES) << _MANTISSA)) << 16).view(np.float32)
    known = _values()[:-1]
    middles = (known[1:] + known[:-1]) / 2
    lower, upper = (np.searchsorted(middles, values, side) for side in ("left", "right"))
    return np.where(lower % 2, upper, lower).astype(np.uint8)


@cache
def _words() -> Words:
    """The bfloat16 of each scale and code."""
    bits = (_values().view(np.uint32) >> 16).astype(np.int32)
    shifts = (np.arange(256, dtype=np.int32)[:, None] - _TOP) << _MANTISSA
    sizes = np.where(bits, np.clip(bits + shifts, 0, _INFINITE - 1), 0)
    words: Words = np.concatenate((sizes, sizes | 0x8000), axis=1).astype(np.uint16)
    return words.reshape(-1)


@cache
def _halves() -> Words:
    """The float16 of each scale and code."""
    singles = (_words().astype(np.uint32) << 16).view(np.float32)
    return np.clip(singles, -_LARGEST_HALF, _LARGEST_HALF).astype(np.float16).view(np.uint16)
