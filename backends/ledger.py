"""A sum of bytes that several processes keep together, and the lock that guards it."""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from typing import TYPE_CHECKING

from lmcache.core.errors import BackendClosed, BackendError

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

_SUM = struct.Struct("<q")


class Ledger:
    """`with ledger:` excludes all other users of the file; `used` is valid only inside.

    The lock is an `flock`: it ends with its owner, however that dies. Processes on one machine
    exclude each other; machines do where the file system carries flocks between them. A holder that
    is stopped fails the others after `timeout_s`, rather than stopping them too.
    """

    def __init__(self, path: str, *, timeout_s: float = 30) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._mutex = threading.Lock()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd: int | None = os.open(path, flags, 0o600)

    def check_open(self) -> int:
        """The open file; raises `BackendClosed` after `close`."""
        if self._fd is None:
            raise BackendClosed(f"{self._path!r} is closed")
        return self._fd

    @property
    def used(self) -> int:
        """The sum, never negative."""
        raw = os.pread(self.check_open(), _SUM.size, 0)
        return int(_SUM.unpack(raw)[0]) if len(raw) == _SUM.size else 0

    @used.setter
    def used(self, value: int) -> None:
        os.pwrite(self.check_open(), _SUM.pack(max(0, value)), 0)

    def __enter__(self) -> Self:
        self._mutex.acquire()
        try:
            self._lock(self.check_open())
        except BaseException:
            self._mutex.release()
            raise
        return self

    def _lock(self, fd: int) -> None:
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BackendError(
                        f"another process has held {self._path!r} locked for {self._timeout_s} s"
                    ) from None
                time.sleep(0.001)
        if os.fstat(fd).st_nlink == 0:
            # a new one would not exclude those who hold this one
            fcntl.flock(fd, fcntl.LOCK_UN)
            raise BackendError(f"{self._path!r} was removed; open the backend again")

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        try:
            fcntl.flock(self.check_open(), fcntl.LOCK_UN)
        finally:
            self._mutex.release()

    def close(self) -> None:
        """Let go of the file. Waits for those inside; closing twice is a no-op."""
        with self._mutex:
            fd, self._fd = self._fd, None
            if fd is not None:
                os.close(fd)
