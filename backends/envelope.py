"""What our codecs put around packed bytes, so that damage is seen before anything is unpacked.

    mark       8 bytes, the codec and the version of its format
    kind       u32, for the codec to use
    reserved   u32, zero
    size       u64, bytes of the object
    checksum   u64, xxh3 of all the rest
    body

All integers are little-endian.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from xxhash import xxh3_64

from lmcache.core.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

_HEAD = struct.Struct("<8sIIQ")
_CHECKSUM = struct.Struct("<Q")
ENVELOPE_BYTES = _HEAD.size + _CHECKSUM.size


def wrap(mark: bytes, kind: int, size: int, body: Sequence[bytes | memoryview]) -> bytes:
    """The envelope with `body`, whose parts are put one after the other."""
    head = _HEAD.pack(mark, kind, 0, size)
    return b"".join((head, _CHECKSUM.pack(_checksum(head, body)), *body))


def unwrap(mark: bytes, packed: memoryview) -> tuple[int, int, memoryview]:
    """Kind, size and body of an envelope; raises `BackendError` if it is damaged."""
    view = packed.cast("B")
    if len(view) < ENVELOPE_BYTES:
        raise BackendError(f"a packed object of {len(view)} bytes is damaged: it has no head")
    head, body = view[: _HEAD.size], view[ENVELOPE_BYTES:]
    (checksum,) = _CHECKSUM.unpack_from(view, _HEAD.size)
    found, kind, reserved, size = _HEAD.unpack(head)
    if (found, reserved) != (mark, 0) or checksum != _checksum(head, (body,)):
        raise BackendError(f"a packed object is damaged, or was not packed by {mark!r}")
    return kind, size, body


def _checksum(head: bytes | memoryview, body: Sequence[bytes | memoryview]) -> int:
    digest = xxh3_64(head)
    for part in body:
        digest.update(part)
    return digest.intdigest()
