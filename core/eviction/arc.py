"""ARC: recency and frequency, balanced by what returns (Megiddo and Modha, FAST 2003)."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from lmcache.core.eviction import EvictionPolicy
from lmcache.core.eviction.linked import (
    GHOSTS_AT_LEAST,
    NONE,
    Ghosts,
    LinkedLists,
    fingerprint,
    fit,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lmcache.core.keys import ChunkKey

_ONCE, _AGAIN = range(2)


class ARCPolicy(EvictionPolicy):
    """Keeps a share for entries seen once and the rest for those seen again, both LRU.

    The paper's T1, T2, B1, B2 and p are the two lists, their ghosts, and `_target`. The cache size
    is the number of residents, and victims are chosen before the newcomer is known, so a returning
    ghost moves the target for the next victim, not for the one it replaces. 17 bytes per entry,
    and 25 for each of the evicted it remembers, which are no more than there are residents.
    """

    def __init__(self) -> None:
        self._lists = LinkedLists(2)
        self._ghosts = Ghosts(2)
        self._fingerprints = array("Q")
        self._target = 0

    def add(self, entry: int, key: ChunkKey) -> None:
        fit(self._fingerprints, entry)
        self._fingerprints[entry] = known = fingerprint(key)
        ghost = self._ghosts.pop(known)
        if ghost != NONE:
            self._adapt(ghost)
        self._lists.push(_ONCE if ghost == NONE else _AGAIN, entry)

    def touch(self, entry: int) -> None:
        self._lists.move(_AGAIN, entry)

    def remove(self, entry: int, *, evicted: bool) -> None:
        number = self._lists.remove(entry)
        if evicted:
            self._ghosts.push(number, self._fingerprints[entry])
        self._trim()

    def victims(self) -> Iterator[int]:
        left = self._lists.sizes.copy()
        last = [NONE, NONE]
        while any(left):
            number = _ONCE if left[_ONCE] > self._target or not left[_AGAIN] else _AGAIN
            left[number] -= 1
            last[number] = self._lists.after(number, last[number])
            yield last[number]

    def _adapt(self, ghost: int) -> None:
        # `ghost` has just lost the one that returned
        step = max(1, self._ghosts.sizes[1 - ghost] // (self._ghosts.sizes[ghost] + 1))
        target = self._target + (step if ghost == _ONCE else -step)
        self._target = min(max(target, 0), sum(self._lists.sizes))

    def _trim(self) -> None:
        """Keep |T1| + |B1| and |B1| + |B2| within the cache size, as the paper does."""
        ghosts = self._ghosts.sizes
        room = max(sum(self._lists.sizes), GHOSTS_AT_LEAST)
        while ghosts[_ONCE] and ghosts[_ONCE] + self._lists.sizes[_ONCE] > room:
            self._ghosts.drop(_ONCE)
        while sum(ghosts) > room:
            self._ghosts.drop(_AGAIN)


__all__ = ["ARCPolicy"]
