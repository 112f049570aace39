"""The codec `fp8`: half the bytes of KV in 16 bits, a quarter of those in 32; lossy.

The kind of the envelope says what the numbers of the object are. The body is the object's header as
it is, then its payload as `e4m3` packs it. Kind 0 is an object whose body is all of it as it is,
because its numbers are of no dtype that can be packed, or not all of them are finite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from lmcache.backends.envelope import ENVELOPE_BYTES, unwrap, wrap
from lmcache.core.codec import Codec
from lmcache.core.errors import BackendError
from lmcache.core.objects import HEADER_BYTES
from lmcache.core.payload import dtype_of, is_object
from lmcache.plugins import hookimpl
from lmcache.plugins.hookspecs import CodecSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

MARK = b"LMCFP8\0\1"
EXACT = 0
DTYPES = {1: "bfloat16", 2: "float16", 3: "float32"}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


class Fp8Codec(Codec):
    """Keeps the numbers of objects as FP8 E4M3, with a scale for each 128 of them.

    What the numbers are is read from the object's header, never guessed.
    """

    name = "fp8"
    lossless: ClassVar[bool] = False

    def encode(self, data: memoryview) -> bytes:
        view = data.cast("B") if data.nbytes else memoryview(b"")
        kind = _kind_of(view)
        body = _packed(view, DTYPES[kind]) if kind else None
        return wrap(MARK, kind if body else EXACT, len(view), body or [view])

    def decode_into(self, packed: memoryview, out: memoryview) -> int | None:
        kind, size, body = unwrap(MARK, packed)
        if size > out.nbytes:
            return None
        view = out.cast("B")[:size] if size else memoryview(bytearray())
        if kind in DTYPES and size >= HEADER_BYTES:
            _unpack_into(body, view, DTYPES[kind])
        elif kind == EXACT and len(body) == size:
            view[:] = body
        else:
            raise BackendError(f"a packed object of kind {kind} has {size} bytes")
        return size

    def max_encoded_size(self, size: int) -> int:
        return ENVELOPE_BYTES + size


def _kind_of(view: memoryview) -> int:
    return KINDS.get(dtype_of(view) or "", EXACT) if is_object(view) else EXACT


def _packed(view: memoryview, dtype: str) -> list[memoryview] | None:
    from lmcache.backends.e4m3 import pack

    payload = pack(view[HEADER_BYTES:], dtype)
    return [view[:HEADER_BYTES], *payload] if payload else None


def _unpack_into(body: memoryview, view: memoryview, dtype: str) -> None:
    from lmcache.backends.e4m3 import packed_size, unpack_into

    expected = HEADER_BYTES + packed_size(len(view) - HEADER_BYTES, dtype)
    if len(body) != expected:
        raise BackendError(f"a packed object has {len(body)} bytes instead of {expected}")
    view[:HEADER_BYTES] = body[:HEADER_BYTES]
    unpack_into(body[HEADER_BYTES:], view[HEADER_BYTES:], dtype)


@hookimpl
def lmcache_codecs() -> Iterable[CodecSpec]:
    yield CodecSpec(Fp8Codec.name, Fp8Codec, "KV as 8-bit floating point; lossy")
