"""S3-FIFO: three queues that never reorder on a hit (Yang et al., SOSP 2023)."""

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

_SMALL, _MAIN = range(2)

_ONE_IN = 10
"""The small queue gives up victims while it has at least one in this many residents."""
_PROMOTING_USES = 2
"""Uses in the small queue that earn a place in the main one."""
_COUNTED_USES = 3
"""Uses beyond these do not count."""


class S3FIFOPolicy(EvictionPolicy):
    """What was hardly used since it came leaves soon; what comes back after that stays longer.

    Newcomers queue in `small`, those evicted from there a short time ago in `main`. At the end of
    `small`, entries that were used twice go to `main`; at the end of `main`, used entries queue
    again, one use poorer. 18 bytes per entry, and 25 for each of the evicted it remembers, which
    are no more than there are residents.
    """

    def __init__(self) -> None:
        self._queues = LinkedLists(2)
        self._ghosts = Ghosts(1)
        self._fingerprints = array("Q")
        self._uses = array("B")

    def add(self, entry: int, key: ChunkKey) -> None:
        if entry >= len(self._uses):
            fit(self._fingerprints, entry)
            fit(self._uses, entry)
        known = fingerprint(key)
        self._queues.push(_SMALL if self._ghosts.pop(known) == NONE else _MAIN, entry)
        self._fingerprints[entry] = known
        self._uses[entry] = 0

    def touch(self, entry: int) -> None:
        if self._uses[entry] < _COUNTED_USES:
            self._uses[entry] += 1

    def remove(self, entry: int, *, evicted: bool) -> None:
        queue = self._queues.remove(entry)
        if evicted and queue == _SMALL:
            self._ghosts.push(_SMALL, self._fingerprints[entry])
        room = max(sum(self._queues.sizes), GHOSTS_AT_LEAST)
        while self._ghosts.sizes[_SMALL] > room:
            self._ghosts.drop(_SMALL)

    def victims(self) -> Iterator[int]:
        queues, uses = self._queues, self._uses
        num_small, num_main = queues.sizes
        # who is offered keeps its place, so the work of finding it is not done again next time
        small = main = NONE
        while num_small or num_main:
            if num_small * _ONE_IN >= num_small + num_main:
                entry = queues.after(_SMALL, small)
                num_small -= 1
                if uses[entry] >= _PROMOTING_USES:
                    uses[entry] = 0
                    queues.move(_MAIN, entry)
                    num_main += 1
                else:
                    small = entry
                    yield entry
            else:
                entry = queues.after(_MAIN, main)
                if uses[entry]:
                    uses[entry] -= 1
                    queues.move(_MAIN, entry)
                else:
                    main = entry
                    num_main -= 1
                    yield entry


__all__ = ["S3FIFOPolicy"]
