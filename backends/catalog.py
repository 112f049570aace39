"""Where each object lies."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from lmcache.backends.direct import padded
from lmcache.backends.journal import ANEW, GONE, NO_ROOM, REMOVED, STORED, Journal, Record

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SLACK = 4096
"""Records without use that a journal may have besides one for each object."""


class Place(NamedTuple):
    """Where an object lies. While it is said to be there, nothing else is written there."""

    segment: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        """Where the next object may begin."""
        return self.offset + padded(self.length)


class Catalog:
    """What the journal at `path` says, some 300 bytes of memory for each object.

    Whoever asks is told what all processes have done by then. Any number of threads at once.
    """

    def __init__(self, path: str) -> None:
        self._journal = Journal(path)
        self._mutex = threading.Lock()
        self._places: dict[bytes, tuple[int, int, int]] = {}
        self._members: defaultdict[int, list[bytes]] = defaultdict(list)
        """What was stored in each segment; some of it lies elsewhere by now, or nowhere."""

    def find(self, key: bytes) -> Place | None:
        """Where an object lies."""
        with self._mutex:
            self._follow()
            found = self._places.get(key)
        return found and Place(*found)

    def count_leading(self, keys: Sequence[bytes]) -> int:
        """How many of `keys`, from the front, are there."""
        with self._mutex:
            self._follow()
            return next((n for n, key in enumerate(keys) if key not in self._places), len(keys))

    def close(self) -> None:
        """Let go of the journal; closing twice is a no-op, and all else raises `BackendClosed`."""
        self._journal.close()

    def store(self, key: bytes, place: Place) -> None:
        """Say that an object lies there, and nowhere else."""
        self._journal.append(Record(key, *place, STORED))

    # all that follows runs with the directory locked

    def remove(self, key: bytes) -> Place | None:
        """Say that an object is gone; return where it was."""
        place = self.find(key)
        if place:
            self._note(Record(key, *place, REMOVED))
        return place

    def drop(self, segment: int) -> bool:
        """Hold a segment and all in it for gone, and say so; False if there is no room for that."""
        try:
            self._note(Record(bytes(32), segment, 0, 0, GONE))
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            return False
        finally:
            with self._mutex:
                self._erase(segment)
        return True

    def segments(self) -> list[int]:
        """Those that hold something, or did."""
        with self._mutex:
            self._follow()
            return list(self._members)

    def holds(self, segment: int) -> bool:
        """Whether anything is in a segment."""
        with self._mutex:
            self._follow()
            return any(self._held(segment))

    def is_full(self, segment: int, size: int) -> bool:
        """Whether what was stored last in a segment of `size` bytes ends it."""
        with self._mutex:
            self._follow()
            members = self._members.get(segment)
            last = self._places.get(members[-1]) if members else None
            return last is not None and last[0] == segment and Place(*last).end == size

    def end_of(self, segment: int) -> int:
        """Where the last object in a segment ends; 0 if it holds none."""
        with self._mutex:
            self._follow()
            return max((place.end for _, place in self._held(segment)), default=0)

    def tidy(self) -> None:
        """Take away what killed processes have left of journals."""
        with self._mutex:
            self._journal.tidy()

    def shorten(self) -> None:
        """Leave out of the journal what means nothing, if that is much."""
        with self._mutex:
            self._follow()
            if self._journal.records <= 2 * len(self._places) + _SLACK:
                return
            records = [Record(key, *place, STORED) for key, place in self._places.items()]
            try:
                self._journal.rewrite(records)
            except OSError as error:
                if error.errno not in NO_ROOM:  # then it may stay as it is
                    raise

    def _note(self, record: Record) -> None:
        with self._mutex:
            self._follow()
            self._journal.append(record)
            self._follow()

    def _follow(self) -> None:
        places, members = self._places, self._members
        for key, segment, offset, length, kind in self._journal.news():
            if kind == STORED:
                places[key] = segment, offset, length
                members[segment].append(key)
            elif kind == REMOVED:
                if places.get(key) == (segment, offset, length):
                    del places[key]
            elif kind == GONE:
                self._erase(segment)
            elif kind == ANEW:
                places.clear()
                members.clear()

    def _erase(self, segment: int) -> None:
        for key, _ in list(self._held(segment)):
            self._places.pop(key, None)
        self._members.pop(segment, None)

    def _held(self, segment: int) -> Iterator[tuple[bytes, Place]]:
        for key in self._members.get(segment, ()):
            found = self._places.get(key)
            if found and found[0] == segment:
                yield key, Place(*found)
