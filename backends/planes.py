"""Byte planes of numbers, around any compressor.

What repeats in floating-point numbers is their sign and exponent, not the digits. So an object is
cut into blocks and each block into planes: the highest byte of all its numbers, the next byte of
all its numbers, and so on. Planes that do not shrink are kept as they are.

The kind of the envelope is the width of a number in bytes. The body is a table with the length of
each packed plane (u32), block by block, the highest plane first; and then the planes. A plane that
is as long as before is not packed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lmcache.backends.envelope import ENVELOPE_BYTES, unwrap, wrap
from lmcache.core.codec import Codec
from lmcache.core.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Pack = Callable[[memoryview], bytes]
    Unpack = Callable[[memoryview, memoryview], None]

BLOCK = 1 << 20
"""Bytes cut into planes at a time: they fit a processor's cache."""
WORDS: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}
_LENGTH = np.dtype("<u4")
_PROBES = 8
_PROBE = 4096
_WORTH = 0.98
"""A plane is packed, or a wider number preferred, if the rest is no more than this."""


class Compressor(Protocol):
    """Makes functions that pack and unpack planes, each of them for one thread."""

    name: str
    mark: bytes
    """What the envelope of its objects begins with, 8 bytes."""

    def packer(self) -> Pack:
        """A function that packs a plane."""

    def unpacker(self) -> Unpack:
        """A function that fills a plane with what a packed one holds, or raises `BackendError`."""


class PlaneCodec(Codec):
    """Packs each byte plane of an object that is worth it with `compressor`."""

    def __init__(self, compressor: Compressor) -> None:
        self.name = compressor.name
        self._compressor = compressor

    def encode(self, data: memoryview) -> bytes:
        whole = np.frombuffer(data, np.uint8)
        pack = self._compressor.packer()
        worth = _plan(pack, whole)
        planes: list[bytes] = []
        for block in _blocks(whole):
            for plane, packs in zip(_split(block, len(worth)), worth, strict=True):
                packed = pack(plane.data) if packs else b""
                planes.append(packed if 0 < len(packed) < plane.size else plane.tobytes())
        table = np.array([len(plane) for plane in planes], _LENGTH)
        return wrap(self._compressor.mark, len(worth), whole.size, [table.tobytes(), *planes])

    def decode_into(self, packed: memoryview, out: memoryview) -> int | None:
        width, size, body = unwrap(self._compressor.mark, packed)
        if size > out.nbytes:
            return None
        if width not in WORDS or size % width:
            raise BackendError(f"a packed object has {size} bytes and numbers of {width} bytes")
        whole = np.frombuffer(out, np.uint8)[:size]
        planes = _planes(body, width * _count(size))
        unpack = self._compressor.unpacker()
        for block in _blocks(whole):
            size_each = block.size // width
            _join(block, [_unpacked(unpack, next(planes), size_each) for _ in range(width)])
        return size

    def max_encoded_size(self, size: int) -> int:
        return ENVELOPE_BYTES + max(WORDS) * _count(size) * _LENGTH.itemsize + size


def _count(size: int) -> int:
    return -(-size // BLOCK)


def _blocks(whole: Bytes) -> Iterator[Bytes]:
    for start in range(0, whole.size, BLOCK):
        yield whole[start : start + BLOCK]


def _plan(pack: Pack, whole: Bytes) -> list[bool]:
    """Which planes are worth packing, for the width that shrinks a sample of `whole` most."""
    stride = max(_PROBE, whole.size // _PROBES // max(WORDS) * max(WORDS))
    starts = range(0, whole.size, stride)
    sample = np.concatenate([whole[:0], *(whole[at : at + _PROBE] for at in starts)])
    best, plan = float(sample.size), [False]
    for width in WORDS:
        if whole.size % width:
            break
        shares = [min(1.0, len(pack(p.data)) / max(1, p.size)) for p in _split(sample, width)]
        rest = sum(shares) / width * sample.size
        if rest <= best * _WORTH:
            best, plan = rest, [share <= _WORTH for share in shares]
    return plan


def _split(block: Bytes, width: int) -> Iterator[Bytes]:
    """The planes of a block, the highest first. Each is valid until the next."""
    words = block.view(WORDS[width])
    plane, shifted = np.empty(words.size, np.uint8), np.empty_like(words)
    for shift in range(8 * width - 8, -8, -8):
        np.right_shift(words, shift, out=shifted)
        np.copyto(plane, shifted, casting="unsafe")  # the lowest byte
        yield plane


def _join(block: Bytes, planes: list[Bytes]) -> None:
    """Fill a block with what its planes say."""
    words = block.view(WORDS[len(planes)])
    np.copyto(words, planes[0])
    for plane in planes[1:]:
        np.left_shift(words, 8, out=words)
        np.bitwise_or(words, plane, out=words)


def _planes(body: memoryview, count: int) -> Iterator[memoryview]:
    """The packed planes of a body, all `count` of which it holds and nothing else."""
    start = count * _LENGTH.itemsize
    if len(body) < start:
        raise BackendError(f"a packed object has no room for a table of {count} planes")
    lengths = np.frombuffer(body[:start], _LENGTH).tolist()
    if len(body) != start + sum(lengths):
        raise BackendError(f"a packed object has {len(body)} bytes, its table says otherwise")
    for length in lengths:
        yield body[start : start + length]
        start += length


def _unpacked(unpack: Unpack, packed: memoryview, size: int) -> Bytes:
    if len(packed) == size:
        return np.frombuffer(packed, np.uint8)
    plane = np.empty(size, np.uint8)
    unpack(packed, plane.data)
    return plane
