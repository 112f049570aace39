"""The bytes of one stored chunk: a header that describes itself, then the payload.

The same bytes lie in a slot of the slab and in every storage tier, so that moving a chunk between
them is one read or write; `docs/format.md` specifies them. The words from `TAGS` on belong to the
slab: each mover writes the slot's generation into its own word when its share of the payload is
complete; in a storage tier they mean nothing and no checksum covers them.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from lmcache.core.slab import WORD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.core.geometry import Geometry
    from lmcache.core.index import Slot
    from lmcache.core.keys import ChunkKey

MAGIC = b"LMCOBJ\r\n"
VERSION = 3
MAX_SLICES = 64
"""An object has one word for each, to say that it is there."""
TAGS = 128
TEXT = TAGS + MAX_SLICES * WORD.size
HEADER_BYTES = TEXT + 4096
"""4736: the payload is aligned to 128 bytes, and not to a page of memory. Pages of engines are, and
between places of one offset in their pages processors copy a quarter slower."""

_FIXED = struct.Struct("<8sHHIQ32s32sQ32s")
_CHECKSUM = struct.Struct("<Q")


@dataclass(frozen=True)
class Description:
    """What a header says about its payload."""

    key: ChunkKey
    root: ChunkKey
    """Of the key's chain: the digest of the namespace and of what else the request depends on."""
    layout: bytes
    """Digest over the layouts of all slices of the payload (32 bytes)."""
    tokens: int
    payload_bytes: int
    text: bytes = b""
    """The layouts themselves, for other programs; see `layouts_text`."""

    @classmethod
    def of(cls, slot: Slot, geometry: Geometry, root: ChunkKey) -> Description:
        """What the object in `slot` must say."""
        tokens, size = geometry.tokens_in([slot]), geometry.bytes_in([slot])
        return cls(slot.key, root, geometry.layout, tokens, size, geometry.text)


def layouts_text(summaries: Sequence[str]) -> bytes:
    """The layouts of all slices as JSON; empty if a header has no room for it."""
    distinct = list(dict.fromkeys(summaries))
    said = {"layouts": distinct, "slices": [distinct.index(summary) for summary in summaries]}
    text = json.dumps(said, separators=(",", ":")).encode()
    return text if len(text) <= HEADER_BYTES - TEXT else b""


def start_header(view: memoryview, about: Description) -> None:
    """Write the header of an object whose payload is yet to come; no mover is done with it."""
    view[:HEADER_BYTES] = _fixed(about, 0) + bytes(TEXT - TAGS) + _padded(about.text)


def seal(view: memoryview) -> None:
    """Write the checksum of a complete object into its header."""
    _CHECKSUM.pack_into(view, TAGS - 40, _checksum(view))


def is_intact(view: memoryview, about: Description) -> bool:
    """Whether `view` holds exactly the object described, every byte of it as it was sealed."""
    return (
        len(view) == HEADER_BYTES + about.payload_bytes
        and view[:TAGS] == _fixed(about, _checksum(view))
        and view[TEXT:HEADER_BYTES] == _padded(about.text)
    )


def _checksum(view: memoryview) -> int:
    return xxh3_64_intdigest(view[HEADER_BYTES:])


def _fixed(about: Description, checksum: int) -> bytes:
    return _FIXED.pack(
        MAGIC,
        VERSION,
        HEADER_BYTES,
        about.tokens,
        about.payload_bytes,
        about.key,
        about.layout,
        checksum,
        about.root,
    )


def _padded(text: bytes) -> bytes:
    return text.ljust(HEADER_BYTES - TEXT, b"\0")
