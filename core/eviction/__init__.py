"""Which chunk leaves when the slab is full.

A policy orders *entries*: small dense integers that the index hands out and reuses, so a policy
can keep its state in flat arrays. The index calls it under its own lock, never concurrently.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lmcache.core.keys import ChunkKey


class EvictionPolicy(ABC):
    """Orders the resident entries by how soon they should leave."""

    @abstractmethod
    def add(self, entry: int, key: ChunkKey) -> None:
        """`entry` becomes resident under `key`. Policies with a memory of the evicted use `key`."""

    @abstractmethod
    def touch(self, entry: int) -> None:
        """`entry` was used."""

    def touch_all(self, entries: Iterable[int]) -> None:
        """Each of them was used, in turn."""
        for entry in entries:
            self.touch(entry)

    @abstractmethod
    def remove(self, entry: int, *, evicted: bool) -> None:
        """`entry` is gone: because it was chosen as a victim, or for another reason."""

    @abstractmethod
    def victims(self) -> Iterator[int]:
        """Resident entries, the one to leave first in front; each at most once.

        The caller passes over entries it may not evict and stops when it has enough. It calls
        `remove` only after it has stopped iterating. Must reach the first victim in amortised O(1).
        """


__all__ = ["EvictionPolicy"]
