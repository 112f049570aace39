"""Bounds what the segments of a directory weigh, for all processes that use it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lmcache.backends.journal import NO_ROOM

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.backends.catalog import Catalog
    from lmcache.backends.segments import Found, Segment, Segments


class Budget:
    """Bounds segments to `max_size` bytes in all, and leaves `min_free` bytes of the disk free.

    A segment has all its blocks before anything is written to it, so bounds are kept where one is
    made, and nowhere else. What counts is what lies there, so no sum can be wrong. (Should
    processes disagree about `max_size`, the largest holds.) Segments that hold nothing any more
    make room first, and then those whose objects were all used the longest ago; what is being
    filled stays. The first that goes becomes the new one: blocks that were written before are
    written faster.

    The journal and the files of others are not counted. A segment that is read while it goes takes
    up space until the reader is done. To be used with the directory locked.
    """

    def __init__(self, segments: Segments, catalog: Catalog, max_size: int, min_free: int) -> None:
        self._segments = segments
        self._catalog = catalog
        self._max_size = max_size
        self._min_free = min_free

    def settle(self) -> None:
        """Put right what killed processes and people have left, and be within bounds."""
        self._catalog.shorten()
        found = list(self._segments)
        for number in set(self._catalog.segments()).difference(f.number for f in found):
            self._catalog.drop(number)
        for segment in found:
            self._trim(segment)
        self._shrink(lambda used: used - self._max_size)
        self._shrink(lambda used: self._missing(used, 0))

    def claim(self, size: int) -> Segment | None:
        """A segment of `size` bytes; None if there is no room even after evicting."""
        self._catalog.shorten()
        victims = self._victims()
        used = sum(victim.size for victim in victims)
        short = self._missing(used, size)
        if short > used:
            return None
        spare = None
        for victim in victims:
            if short <= 0 and (spare or self._catalog.holds(victim.number)):
                break
            if taken := self._segments.take(victim.number):
                short -= taken.size
                if self._note_gone(taken) and not spare:
                    spare = taken
                else:
                    taken.unlink()
        if short > 0:
            if spare:
                spare.unlink()
            return None
        return self._made(spare, size)

    def _made(self, spare: Segment | None, size: int) -> Segment | None:
        if spare:
            spare.renew()
        segment = spare or self._segments.create()
        try:
            segment.resize(size)
        except OSError as error:
            segment.unlink()
            if error.errno in NO_ROOM:
                return None
            raise
        return segment

    def _note_gone(self, segment: Segment) -> bool:
        """Whether all know that nothing is in it, so that its blocks may be written again."""
        try:
            self._catalog.drop(segment.number)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self._catalog.forget(segment.number)
            return False
        return True

    def _trim(self, segment: Found) -> None:
        """Take away what was never written, unless it is about to be."""
        if self._catalog.is_full(segment.number, segment.size):
            return
        end = self._catalog.end_of(segment.number)
        if end < segment.size and (taken := self._segments.take(segment.number)):
            taken.finish(end)

    def _shrink(self, missing: Callable[[int], int]) -> None:
        """Evict what is missing, or nothing if that would not be enough."""
        victims = self._victims()
        used = sum(victim.size for victim in victims)
        short = missing(used)
        if short > used:
            return
        for victim in victims:
            if short <= 0:
                return
            if taken := self._segments.take(victim.number):
                short -= taken.size
                self._note_gone(taken)
                taken.unlink()

    def _victims(self) -> list[Found]:
        """All segments, in the order in which they have to go."""
        return sorted(
            self._segments,
            key=lambda f: (self._catalog.holds(f.number), f.used_ns, f.number),
        )

    def _missing(self, used: int, need: int) -> int:
        """How many bytes must go before `need` more may come to `used`."""
        over = used + need - self._max_size
        disk = os.statvfs(self._segments.directory)
        if not disk.f_blocks:  # unbounded, or unwilling to tell
            return over
        return max(over, self._min_free + need - disk.f_bavail * disk.f_frsize)
