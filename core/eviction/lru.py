"""Least recently used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache.core.eviction import EvictionPolicy
from lmcache.core.eviction.linked import LinkedLists

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lmcache.core.keys import ChunkKey

_RECENCY = 0


class LRUPolicy(EvictionPolicy):
    """What was added or touched least recently leaves first. 9 bytes per entry."""

    def __init__(self) -> None:
        self._lists = LinkedLists(1)

    def add(self, entry: int, key: ChunkKey) -> None:
        self._lists.push(_RECENCY, entry)

    def touch(self, entry: int) -> None:
        self._lists.move(_RECENCY, entry)

    def touch_all(self, entries: Iterable[int]) -> None:
        self._lists.renew(_RECENCY, entries)

    def remove(self, entry: int, *, evicted: bool) -> None:
        self._lists.remove(entry)

    def victims(self) -> Iterator[int]:
        return self._lists.walk(_RECENCY)


__all__ = ["LRUPolicy"]
