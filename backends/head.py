"""The segment that a process fills."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from lmcache.core.errors import BackendClosed

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.backends.segments import Segment

_CHECK_S = 0.1
"""How long a segment that was there is taken to be: asking costs as much as all else here."""


class Room(NamedTuple):
    """Where an object may be written."""

    segment: Segment
    offset: int


class Head:
    """Gives out room in segments of `size` bytes, which `claim` makes; any number of threads.

    An object that is larger has a segment of its own. What is full is left to others when its last
    object has been written, without what it did not need, if that is much.
    """

    def __init__(self, claim: Callable[[int], Segment | None], size: int) -> None:
        self._claim = claim
        self._size = size
        self._mutex = threading.Lock()
        self._segment: Segment | None = None
        self._left: deque[Segment] = deque()
        """Those that nobody writes to any more."""
        self._finishing = threading.Lock()
        self._checked_s = 0.0
        self._closed = False

    def take(self, size: int) -> Room | None:
        """`size` bytes, whole blocks, until they are given back; None if there is no room."""
        with self._mutex:
            segment = self._with_room_for(size)
            if segment is None:
                return None
            room = Room(segment, segment.end)
            segment.end += size
            segment.writers += 1
            if segment.end == segment.size and segment is self._segment:
                self._segment = None  # it may be evicted once this is written
        return room

    def give_back(self, room: Room) -> None:
        """Say that nobody writes there any more."""
        with self._mutex:
            room.segment.writers -= 1
            self._part_with(room.segment)
        if self._left:
            self._finish_left()

    def leave(self, number: int) -> None:
        """Write no more to a segment."""
        with self._mutex:
            if self._segment and self._segment.number == number:
                self._change(None)
        self._finish_left()

    def close(self) -> None:
        """Give out no more; closing twice is a no-op."""
        with self._mutex:
            self._closed = True
            self._change(None)
        self._finish_left()

    def _with_room_for(self, size: int) -> Segment | None:
        if self._closed:
            raise BackendClosed("the files are closed")
        head = self._segment
        if head and head.end + size <= head.size and self._seems_intact(head):
            return head
        segment = self._claim(max(size, self._size))
        if not segment:
            self._change(None)  # it may have to make room
            self._finish_left()
            segment = self._claim(size)
        if size <= self._size:
            self._change(segment)
        return segment

    def _seems_intact(self, head: Segment) -> bool:
        now_s = time.monotonic()
        if now_s < self._checked_s + _CHECK_S:
            return True
        if not head.is_intact:
            return False
        self._checked_s = now_s
        return True

    def _change(self, segment: Segment | None) -> None:
        before, self._segment = self._segment, segment
        if before:
            self._part_with(before)

    def _part_with(self, segment: Segment) -> None:
        if segment is not self._segment and not segment.writers:
            self._left.append(segment)

    def _finish_left(self) -> None:
        """Leave them to others. Who gives back does so without the mutex, as it takes time."""
        with self._finishing, ExitStack() as each:  # an error in one does not leave out others
            while self._left:
                segment = self._left.popleft()
                each.callback(segment.finish, segment.end)
