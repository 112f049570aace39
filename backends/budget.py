"""Bounds what the segments of a directory weigh, for all processes that use it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from lmcache.backends.journal import NO_ROOM

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.backends.catalog import Catalog
    from lmcache.backends.segments import Found, Segment, Segments


class Budget:
    """Bounds segments to `max_size` bytes in all, and leaves `min_free` bytes of the disk free.

    A segment has all its blocks before anything is written to it, where the file system can do
    that, so bounds are kept where one is made, and nowhere else. What counts is what lies there, so
    no sum can be wrong. (Should processes disagree about `max_size`, the largest holds.) Segments
    that hold nothing any more make room first, and then those whose objects were all used the
    longest ago; what is being filled stays. The first that goes becomes the new one: blocks that
    were written before are written faster.

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
        self._catalog.tidy()
        self._catalog.shorten()
        found = list(self._segments)
        for number in set(self._catalog.segments()).difference(f.number for f in found):
            self._catalog.drop(number)
        for segment in found:
            self._trim(segment)
        self._shrink(lambda used: used - self._max_size)
        self._shrink(lambda used: self._missing(used, 0))

    def claim(self, size: int) -> Segment | None:
        """A segment of `size` bytes; None if there is no room even after evicting.

        Raises `OSError` if the disk has none although it should, even after as much was evicted.
        """
        self._catalog.shorten()
        victims = self._victims()
        used = sum(victim.size for victim in victims)
        short = self._missing(used, size)
        if short > used:
            return None
        try:
            return self._claim(victims, short, size)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
        return self._claim(self._victims(), size, size)  # a quota may be what is full

    def _claim(self, victims: list[Found], short: int, size: int) -> Segment | None:
        """Likewise, where `short` bytes have to go: all of them, or nothing does."""
        with ExitStack() as undo:
            taken = self._take(victims, short, undo)
            if sum(segment.size for segment in taken) < short:
                return None
            segment = self._evict(taken)
            if segment is None:
                segment = self._segments.create()
                undo.callback(segment.close)
            try:
                segment.resize(size)
            except BaseException:
                segment.unlink()
                raise
            undo.pop_all()
            return segment

    def _take(self, victims: list[Found], short: int, undo: ExitStack) -> list[Segment]:
        """Segments of `short` bytes if they can be had, and one that holds nothing."""
        taken: list[Segment] = []
        for victim in victims:
            if short <= 0 and (taken or self._catalog.holds(victim.number)):
                break
            if segment := self._segments.take(victim.number):
                undo.callback(segment.close)
                taken.append(segment)
                short -= segment.size
        return taken

    def _evict(self, taken: list[Segment]) -> Segment | None:
        """Let go of all that is in them; return one that may be written anew."""
        spare = None
        for segment in taken:
            # all must know that nothing is there before anything else may be
            if self._catalog.drop(segment.number) and not spare and segment.renew():
                spare = segment
            else:
                segment.unlink()
        return spare

    def _trim(self, found: Found) -> None:
        """Take away what was never written, unless it is about to be."""
        if self._catalog.is_full(found.number, found.size):
            return
        if segment := self._segments.take(found.number):
            segment.finish(self._catalog.end_of(found.number))

    def _shrink(self, missing: Callable[[int], int]) -> None:
        """Evict what is missing, or nothing if that would not be enough."""
        victims = self._victims()
        used = sum(victim.size for victim in victims)
        with ExitStack() as undo:
            short = missing(used)
            if 0 < short <= used:
                for segment in self._take(victims, short, undo):
                    self._catalog.drop(segment.number)
                    segment.unlink()

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
