"""How far each rank is with copying what is stored, where the leader can see it.

When TensorRT-LLM asks the leader about a request that has ended, no other rank is asked or told
anything before its blocks are taken back.
"""

from __future__ import annotations

import os
import time
from mmap import mmap
from pathlib import Path

from lmcache.core.errors import LayoutError

COPIED_S = 3.0
"""How long a request that has ended is held up until its blocks have been read."""
WORD_BYTES = 8
GLANCE_S = 0.0001
ALL = (1 << 64) - 1
"""In place of a pass: whatever there will be."""


def _file_of(engine_id: str) -> Path:
    return Path(f"/dev/shm/lmcache-board-{engine_id}")  # noqa: S108 - made anew, for us alone


class Board:
    """Numbers of passes, in memory that all ranks map: what each has copied, the leader began."""

    def __init__(self, engine_id: str) -> None:
        """On any rank, once it is there. Raises `LayoutError` where it is not."""
        try:
            fd = os.open(_file_of(engine_id), os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise LayoutError(f"no memory that all ranks share: {error}") from error
        try:
            words = memoryview(mmap(fd, 0)).cast("Q")
        finally:
            os.close(fd)
        self._begun, self._copied = words[:1], words[1:]
        self._stuck = -1
        """What had been copied by all when that was waited for in vain."""

    @staticmethod
    def create(engine_id: str, ranks: int) -> None:
        """On the leader, before others look for it; to be removed even if this fails.

        Raises `LayoutError` where there is no room.
        """
        try:
            fd = os.open(_file_of(engine_id), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.posix_fallocate(fd, 0, (1 + ranks) * WORD_BYTES)
            finally:
                os.close(fd)
        except OSError as error:
            raise LayoutError(f"no memory for all ranks to share: {error}") from error

    @staticmethod
    def remove(engine_id: str) -> None:
        """Let nobody else map it, who has it keeps it; again does nothing."""
        _file_of(engine_id).unlink(missing_ok=True)

    @property
    def copied(self) -> int:
        """The last pass of which no rank will read again what it stores, nor of those before."""
        return min(self._copied)

    def begin(self, number: int) -> None:
        """On the leader: its copies of a pass are under way."""
        self._begun[0] = number

    def note(self, rank: int, number: int) -> None:
        """A rank will not read again what it stores of this pass, or of one before."""
        self._copied[rank] = number

    def wait(self, number: int) -> bool:
        """On the leader: wait until no rank reads what a pass stores; whether all have copied it.

        A pass that failed has begun no copies, but those of the one before may be under way.
        Ranks that are stuck are not waited for a second time.
        """
        due, deadline = min(number, self._begun[0]), time.monotonic() + COPIED_S
        while (copied := self.copied) < due:
            if copied == self._stuck or time.monotonic() > deadline:
                self._stuck = copied
                return False
            time.sleep(GLANCE_S)
        return copied >= number
