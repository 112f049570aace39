"""Which chunk lies in which slot.

Entries are dense integers into flat columns: a million Python objects would cost the collector
more than the chunks are worth.
"""

from __future__ import annotations

from array import array
from contextlib import suppress
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from lmcache.core.keys import ChunkKey  # noqa: TC001 - read where slots are decoded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ABSENT = -1

ALL = 255
"""As many slower tiers as there may be."""


class Slot(NamedTuple):
    """A place in the slab that holds, or is to hold, one chunk."""

    key: ChunkKey
    offset: int
    size: int
    """Bytes of the object, header included."""
    generation: int
    """Unique for each reservation: bytes of another generation are another chunk's."""
    chunk: int
    """Which chunk of its sequence it is."""


_NEW_SLOT: Callable[[Any], Slot] = partial(tuple.__new__, Slot)
"""`Slot._make` in half the time."""


class Index:
    """Chunk key to entry, and what each entry knows about its slot."""

    def __init__(self) -> None:
        self._entry_of: dict[ChunkKey, int] = {}
        self._free = array("i")
        self.keys: list[ChunkKey | None] = []
        self.offset = array("q")
        self.size = array("q")
        self.generation = array("q")
        self.pins = array("I")
        self.lacking = array("B")
        """How many slower tiers, from the first on, are to have it and did not when it came."""
        self.told = array("B")
        """Whether those who write late have been told of it."""

    def __len__(self) -> int:
        return len(self._entry_of)

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._entry_of

    def find(self, key: ChunkKey) -> int:
        """The entry of `key`, or `ABSENT`."""
        return self._entry_of.get(key, ABSENT)

    def leading(self, keys: Iterable[ChunkKey]) -> list[int]:
        """The entries of `keys`, up to the first that is absent. Safe without a lock, as a hint."""
        entries: list[int] = []
        with suppress(KeyError):  # a key is computed when it is its turn
            entries.extend(map(self._entry_of.__getitem__, keys))
        return entries

    def add(self, slot: Slot, *, lacking: int = ALL) -> int:
        """Record a complete slot and return its entry."""
        if self._free:
            entry = self._free.pop()
            self.keys[entry] = slot.key
            self.offset[entry], self.size[entry] = slot.offset, slot.size
            self.generation[entry] = slot.generation
        else:
            entry = len(self.keys)
            self.keys.append(slot.key)
            self.offset.append(slot.offset)
            self.size.append(slot.size)
            self.generation.append(slot.generation)
            self.pins.append(0)
            self.lacking.append(0)
            self.told.append(0)
        self.lacking[entry], self.told[entry] = lacking, False
        self._entry_of[slot.key] = entry
        return entry

    def slot(self, entry: int, chunk: int) -> Slot:
        """The slot of an entry, as chunk number `chunk` of some sequence."""
        key = self.keys[entry]
        assert key is not None, "a live entry has a key"
        return Slot(
            key,
            self.offset[entry],
            self.size[entry],
            self.generation[entry],
            chunk,
        )

    def leading_slots(self, entries: list[int], first: int = 0) -> list[Slot]:
        """The slots of entries that are chunks of some sequence, from number `first` on."""
        if len(entries) < 2:  # noqa: PLR2004  (of which `itemgetter` makes no tuple)
            return [self.slot(entry, chunk) for chunk, entry in enumerate(entries, first)]
        of: Callable[[Any], tuple[Any, ...]] = itemgetter(*entries)
        numbers = range(first, first + len(entries))
        columns = (self.keys, self.offset, self.size, self.generation)
        return list(map(_NEW_SLOT, zip(*map(of, columns), numbers, strict=True)))

    def remove(self, entry: int) -> ChunkKey:
        """Forget an entry, whose number may be given out again."""
        key = self.keys[entry]
        assert key is not None, "entry removed twice"
        assert self.pins[entry] == 0, "a pinned entry was removed"
        self.keys[entry] = None
        del self._entry_of[key]
        self._free.append(entry)
        return key
