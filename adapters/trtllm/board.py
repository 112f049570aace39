"""How far each rank is with copying what is stored, where the leader can see it.

When TensorRT-LLM asks the leader about a request that has ended, no other rank is asked or told
anything before its blocks are taken back.
"""

from __future__ import annotations

import time
from mmap import mmap
from pathlib import Path

COPIED_S = 3.0
"""How long a request that has ended is held up until its blocks have been read."""
WORD_BYTES = 8
GLANCE_S = 0.0001


def _file_of(engine_id: str) -> Path:
    return Path(f"/dev/shm/lmcache-board-{engine_id}")  # noqa: S108 - nobody can guess it


class Board:
    """Numbers of passes, in memory that all ranks map: what each has copied, the leader began."""

    def __init__(self, engine_id: str) -> None:
        """On any rank, once it is there. Raises `OSError` where it cannot be mapped."""
        self._file = _file_of(engine_id)
        with self._file.open("r+b") as opened:
            words = memoryview(mmap(opened.fileno(), 0)).cast("Q")
        self._begun, self._copied = words[:1], words[1:]

    @classmethod
    def create(cls, engine_id: str, ranks: int) -> Board:
        """On the leader. Raises `OSError` where there is no room."""
        with _file_of(engine_id).open("xb") as opened:
            opened.write(bytes((1 + ranks) * WORD_BYTES))
        return cls(engine_id)

    def remove(self) -> None:
        """Let nobody else map it; again does nothing."""
        self._file.unlink(missing_ok=True)

    def begin(self, number: int) -> None:
        """On the leader: its copies of a pass are under way."""
        self._begun[0] = number

    def note(self, rank: int, number: int) -> None:
        """A rank will not read again what it copies of this pass, or of one before."""
        self._copied[rank] = number

    def wait(self, number: int) -> bool:
        """On the leader: wait until all ranks have noted a pass; whether they have in time.

        A pass that failed has begun nothing, and is not waited for.
        """
        deadline = time.monotonic() + COPIED_S
        while self._begun[0] >= number and time.monotonic() < deadline:
            if min(self._copied) >= number:
                return True
            time.sleep(GLANCE_S)
        return False
