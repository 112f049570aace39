"""What the files of a directory weigh, as several processes keep it together, and their lock."""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from lmcache.core.errors import BackendClosed, BackendError

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

LEAVES = 4096
_COUNTED = b"LMCLEDG1"
_HEAD = struct.Struct("<8sq")
_LEAF = struct.Struct("<qQ")
_SIZE = _HEAD.size + LEAVES * _LEAF.size


class Leaf(NamedTuple):
    """One of the directories that hold files."""

    charged: int
    """Bytes; never less than what is there."""
    changes: int
    """Grows whenever a file comes, goes or is renamed."""


class Ledger:
    """`with ledger:` excludes all other users of the file; all else is valid only inside.

    A sum is raised before a file comes and lowered after it has gone, so whoever is killed leaves
    it too high. Because there is one for each leaf, what is too high can be put right leaf by leaf.

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
        # a disk that is too full for it will have room when the first object has gone
        with suppress(OSError):
            os.posix_fallocate(self._fd, 0, _SIZE)

    def check_open(self) -> int:
        """The open file; raises `BackendClosed` after `close`."""
        if self._fd is None:
            raise BackendClosed(f"{self._path!r} is closed")
        return self._fd

    @property
    def is_counted(self) -> bool:
        """Whether all that was there before the ledger has been counted."""
        return bool(self._read(0, _HEAD)[0] == _COUNTED)

    @property
    def used(self) -> int:
        """The sum over all leaves, or more."""
        return int(self._read(0, _HEAD)[1])

    def leaf(self, number: int) -> Leaf:
        """What is known of one leaf."""
        return Leaf(*self._read(_HEAD.size + number * _LEAF.size, _LEAF))

    def charge(self, number: int, size: int) -> None:
        """Note a change in a leaf, by which its files weigh `size` bytes more, or less."""
        charged, changes = self.leaf(number)
        grown = max(size, -charged)
        # a kill between the two leaves the sum too high, and `sum_up` puts it right
        if grown > 0:
            self._add(grown)
        where = _HEAD.size + number * _LEAF.size
        os.pwrite(self.check_open(), _LEAF.pack(charged + grown, changes + 1), where)
        if grown < 0:
            self._add(grown)

    def settle(self, number: int, before: Leaf, counted: int) -> bool:
        """Charge a leaf for what was `counted` since `before`; False if it changed meanwhile."""
        if self.leaf(number).changes != before.changes:
            return False
        if counted != before.charged:
            self.charge(number, counted - before.charged)
        return True

    def charges(self) -> list[int]:
        """The sum of each leaf."""
        raw = os.pread(self.check_open(), _SIZE, 0).ljust(_SIZE, b"\0")
        return [charged for charged, _ in _LEAF.iter_unpack(raw[_HEAD.size :])]

    def sum_up(self) -> None:
        """Take the sum anew from the leaves, all of which have been counted."""
        os.pwrite(self.check_open(), _HEAD.pack(_COUNTED, sum(self.charges())), 0)

    def _read(self, where: int, what: struct.Struct) -> tuple[Any, ...]:
        raw = os.pread(self.check_open(), what.size, where)
        return what.unpack(raw.ljust(what.size, b"\0"))

    def _add(self, size: int) -> None:
        used = self.used + size
        os.pwrite(self.check_open(), used.to_bytes(8, "little", signed=True), 8)

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
