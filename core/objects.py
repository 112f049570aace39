"""The bytes of one stored chunk: a header that describes itself, then the payload.

The same bytes lie in a slot of the slab and in every storage tier, so that moving a chunk between
them is one read or write. All integers are little-endian. The words from `TAGS` on belong to the
slab: each mover writes the slot's generation into its own word when its share of the payload is
complete; in a storage tier they mean nothing and no checksum covers them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from lmcache.core.slab import WORD

if TYPE_CHECKING:
    from lmcache.core.geometry import Geometry
    from lmcache.core.index import Slot
    from lmcache.core.keys import ChunkKey

MAGIC = b"LMCOBJ\r\n"
VERSION = 1
MAX_SLICES = 64
"""An object has one word for each, to say that it is there."""
HEADER_BYTES = 128 + MAX_SLICES * WORD.size
"""640: the payload that follows stays aligned to 128 bytes."""
TAGS = 128

_FIXED = struct.Struct("<8sHHIQ32s32sQ32s")
"""The last field is spare: zero, and checked like the rest."""


@dataclass(frozen=True)
class Description:
    """What a header says about its payload."""

    key: ChunkKey
    layout: bytes
    """Digest over the layouts of all slices of the payload (32 bytes)."""
    pages: int
    payload_bytes: int

    @classmethod
    def of(cls, slot: Slot, geometry: Geometry) -> Description:
        """What the object in `slot` must say."""
        return cls(slot.key, geometry.layout, slot.pages, slot.pages * geometry.page_bytes)


def _write(view: memoryview, about: Description, checksum: int) -> None:
    _FIXED.pack_into(
        view,
        0,
        MAGIC,
        VERSION,
        HEADER_BYTES,
        about.pages,
        about.payload_bytes,
        about.key,
        about.layout,
        checksum,
        b"",
    )


def start_header(view: memoryview, about: Description) -> None:
    """Write the header of an object whose payload is yet to come; no mover is done with it."""
    _write(view, about, 0)
    view[TAGS:HEADER_BYTES] = bytes(HEADER_BYTES - TAGS)


def seal(view: memoryview, about: Description) -> None:
    """Write the header of a complete object, with the checksum of its payload."""
    payload = view[HEADER_BYTES : HEADER_BYTES + about.payload_bytes]
    _write(view, about, xxh3_64_intdigest(payload))


def is_intact(view: memoryview, about: Description) -> bool:
    """Whether `view` holds exactly the object described, every byte of it as it was sealed."""
    if len(view) != HEADER_BYTES + about.payload_bytes:
        return False
    checksum = xxh3_64_intdigest(view[HEADER_BYTES:])
    expected = (MAGIC, VERSION, HEADER_BYTES, about.pages, about.payload_bytes)
    return _FIXED.unpack_from(view, 0) == (*expected, about.key, about.layout, checksum, bytes(32))
