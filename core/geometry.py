"""The shape of one engine's objects: what the decider must know about pages it never touches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from blake3 import blake3

from lmcache.core.errors import ConfigError
from lmcache.core.objects import HEADER_BYTES, MAX_SLICES, TAGS
from lmcache.core.slab import WORD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.core.index import Slot


@dataclass(frozen=True)
class Geometry:
    """Objects of an engine whose movers each hold a slice of every page."""

    page_tokens: int
    pages_per_chunk: int
    slices: tuple[int, ...]
    """Bytes stored for the tokens of one page in each slice, over all cache groups: one for each
    mover, or fewer where movers hold the same."""
    layout: bytes
    """Digest over the layouts of all slices."""
    text: bytes = b""
    """What the headers of its objects say of these layouts; only who writes headers needs it."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.slices) <= MAX_SLICES:
            raise ConfigError(f"{len(self.slices)} slices; between 1 and {MAX_SLICES} fit")

    def __str__(self) -> str:
        size = self.slot_bytes(self.pages_per_chunk) / (1 << 20)
        return (
            f"chunks of {self.chunk_tokens} tokens ({self.pages_per_chunk} pages, {size:.1f} MiB)"
        )

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a full chunk."""
        return self.page_tokens * self.pages_per_chunk

    @cached_property
    def page_bytes(self) -> int:
        """Bytes stored for the tokens of one page over all slices."""
        return sum(self.slices)

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(self.slices)]

    def slot_bytes(self, pages: int) -> int:
        """Bytes of an object of `pages` pages, header included."""
        return HEADER_BYTES + pages * self.page_bytes

    def pages_of(self, slot: Slot) -> int:
        """Pages of each cache group in a slot: whoever else has stored it may count otherwise."""
        return (slot.size - HEADER_BYTES) // self.page_bytes

    def bytes_in(self, slots: Sequence[Slot]) -> int:
        """Bytes of all their pages."""
        return sum(slot.size for slot in slots) - len(slots) * HEADER_BYTES

    def tokens_in(self, slots: Sequence[Slot]) -> int:
        """Tokens of all their pages."""
        return self.bytes_in(slots) // self.page_bytes * self.page_tokens

    def payload_offset(self, index: int, pages: int) -> int:
        """Where slice `index` starts inside an object of `pages` pages."""
        return HEADER_BYTES + pages * self._starts[index]

    def tag_offset(self, index: int) -> int:
        """Where the word of slice `index` lies inside an object."""
        return TAGS + index * WORD.size


def pages_per_chunk(chunk_size: int, page_tokens: int) -> int:
    """The pages of a chunk of `chunk_size` tokens, rounded up to whole pages."""
    return -(-chunk_size // page_tokens)


def combined_layout(fingerprints: list[str]) -> bytes:
    """One digest for the layouts of all slices, in slice order."""
    return blake3("\n".join(fingerprints).encode()).digest()
