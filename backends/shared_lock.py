"""A lock that processes share, and that ends with whoever holds it."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from lmcache.core.errors import BackendClosed, BackendError

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


class SharedLock:
    """`with lock:` excludes all other threads and processes that use the file at `path`.

    It is an `flock`, so it ends with its owner, however that dies. A holder that is stopped fails
    the others after `timeout_s`, rather than stopping them too.
    """

    def __init__(self, path: str, *, timeout_s: float = 30) -> None:
        self.path = path
        self._timeout_s = timeout_s
        self._mutex = threading.Lock()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd: int | None = os.open(path, flags, 0o600)

    def check_open(self) -> int:
        """The open file; raises `BackendClosed` after `close`."""
        if self._fd is None:
            raise BackendClosed(f"{self.path!r} is closed")
        return self._fd

    def check_there(self) -> None:
        """Raises `BackendError` if the file was removed: another would not exclude us."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), os.fstat(self.check_open())):
                return
        raise BackendError(f"{self.path!r} was removed; open the backend again")

    def __enter__(self) -> Self:
        deadline = time.monotonic() + self._timeout_s
        if not self._mutex.acquire(timeout=self._timeout_s):
            raise self._late()
        try:
            self._lock(self.check_open(), deadline)
        except BaseException:
            self._mutex.release()
            raise
        return self

    def _lock(self, fd: int, deadline: float) -> None:
        while not try_flock(fd):
            if time.monotonic() > deadline:
                raise self._late()
            time.sleep(0.001)

    def _late(self) -> BackendError:
        return BackendError(
            f"another process has held {self.path!r} locked for {self._timeout_s} s"
        )

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


def try_flock(fd: int) -> bool:
    """Lock an open file against all who open it themselves; False if one of them was faster."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
