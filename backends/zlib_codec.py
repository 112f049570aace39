"""The codec `zlib`: fast, lossless, and readable by any zlib."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

from lmcache.core.codec import Codec
from lmcache.core.errors import BackendError
from lmcache.plugins import hookimpl
from lmcache.plugins.hookspecs import CodecSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

_LEVEL = 1
_STORED_MAX = 0xFFFF
_STORED_HEADER = struct.Struct("<BHH")


class ZlibCodec(Codec):
    """Packs an object as one zlib stream, whose checksum covers all of it."""

    name = "zlib"

    def encode(self, data: memoryview) -> bytes:
        packed = zlib.compress(data, _LEVEL)
        return packed if len(packed) <= self.max_encoded_size(data.nbytes) else _store(data)

    def decode_into(self, packed: memoryview, out: memoryview) -> int | None:
        decoder = zlib.decompressobj()
        try:
            # one byte more than fits, or the decoder stops before it has checked the checksum
            data = decoder.decompress(packed, out.nbytes + 1)
        except zlib.error as error:
            raise BackendError(f"a zlib object is damaged: {error}") from error
        if len(data) > out.nbytes:
            return None
        if not decoder.eof or decoder.unused_data:
            raise BackendError("a zlib object is damaged: its end is not where it should be")
        if data:
            out.cast("B")[: len(data)] = data
        return len(data)

    def max_encoded_size(self, size: int) -> int:
        blocks = max(1, -(-size // _STORED_MAX))
        return 2 + blocks * _STORED_HEADER.size + size + 4


def _store(data: memoryview) -> bytes:
    """Pack `data` uncompressed: the bound must not depend on how a build of zlib gives up."""
    parts: list[bytes | memoryview] = [b"\x78\x01"]
    view = data.cast("B")
    for start in range(0, len(view), _STORED_MAX):
        block = view[start : start + _STORED_MAX]
        last = start + len(block) == len(view)
        parts += [_STORED_HEADER.pack(last, len(block), len(block) ^ 0xFFFF), block]
    parts.append(zlib.adler32(view).to_bytes(4, "big"))
    return b"".join(parts)


@hookimpl
def lmcache_codecs() -> Iterable[CodecSpec]:
    yield CodecSpec(ZlibCodec.name, ZlibCodec, "zlib at its fastest level; lossless")
