"""A directory of object files whose bytes are bounded for all processes that use it.

<dir>/ab/c/abc...64 hex digits.kv    an object: nothing but its bytes
<dir>/ab/c/abc...digits.*.tmp        one being written; its writer holds an flock on it
<dir>/usage                          the bytes charged by all processes; see `ledger`
"""

from __future__ import annotations

import errno
import fcntl
import heapq
import os
import re
import secrets
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from lmcache.backends.ledger import Ledger
from lmcache.core.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK = 4096
_NO_FALLOCATE = (errno.EINVAL, errno.EOPNOTSUPP)
_VICTIMS = 16384
"""Candidates kept from one scan: some 4 MB, and as many evictions share the cost of the scan."""
_STALE_S = 3600
_DIGITS = 64
_NAMES = tuple(
    map(re.compile, ("[0-9a-f]{2}", "[0-9a-f]", r"[0-9a-f]{64}\.(kv|[0-9a-f]{16}\.tmp)"))
)
"""What our directories and files are called, level by level."""


class Reservation(NamedTuple):
    """A temporary file that has been charged for."""

    path: str
    fd: int
    charge: int


class Budget:
    """Bounds the bytes of objects in `directory` to `max_size`, and leaves `min_free` bytes free.

    Bytes are charged before they are written: with the ledger locked, the objects that were used
    the longest ago make room, and a temporary file is created with all its blocks. The data follows
    without the lock. The sum is kept in the directory, not in a process, so that `max_size` bounds
    all processes together, at every instant, with what was there before. (Should they disagree
    about `max_size`, the largest holds.) A process that is killed, or a person who deletes files,
    leaves the sum too high, never too low, until somebody counts again: at each start, and each
    time the known candidates for removal run out.

    A file is charged in blocks of 4 KiB; directories and the files of others are neither counted
    nor touched. An object that is read while it is evicted takes up space until the reader is done.
    Recency is the modification time of a file, so all processes share one order.
    """

    def __init__(self, directory: str, max_size: int, min_free: int) -> None:
        self._directory = directory
        self._max_size = max_size
        self._min_free = min_free
        self._victims: deque[tuple[int, str]] = deque()
        self._ledger = Ledger(f"{directory}/usage")
        with self._ledger:
            self._recount()
            self._evict(self._ledger.used - max_size)
            self._make_room(0)

    def path(self, name: str) -> str:
        """Where the object called `name`, 64 hex digits, is or would be."""
        assert len(name) == _DIGITS
        self._ledger.check_open()
        return f"{self._directory}/{name[:2]}/{name[2]}/{name}.kv"

    def reserve(self, path: str, size: int) -> Reservation | None:
        """Claim the bytes for an object; None if there is no room even after evicting."""
        temporary = f"{path.removesuffix('.kv')}.{secrets.token_hex(8)}.tmp"
        charge = _charge(size)
        with self._ledger:
            if not self._make_room(charge):
                return None
            fd = _create(temporary)
            self._ledger.used += charge
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _allocate(fd, size)
            except BaseException:
                os.close(fd)
                os.unlink(temporary)
                self._ledger.used -= charge
                raise
        return Reservation(temporary, fd, charge)

    def commit(self, reservation: Reservation, path: str) -> None:
        """Make a written reservation the object at `path`, in place of any other."""
        with self._ledger:
            try:
                replaced = _charge(os.stat(path).st_size)
            except FileNotFoundError:
                replaced = 0
            os.replace(reservation.path, path)
            self._ledger.used -= replaced

    def cancel(self, reservation: Reservation) -> None:
        """Give a reservation back. If the ledger is gone, the next scan does it."""
        with suppress(BackendError, FileNotFoundError), self._ledger:
            os.unlink(reservation.path)
            self._ledger.used -= reservation.charge

    def remove(self, path: str) -> bool:
        """Remove the object at `path`; return whether it was there."""
        with self._ledger:
            return self._drop(path) is not None

    def close(self) -> None:
        """Let go of the directory; closing twice is a no-op."""
        self._ledger.close()

    # all that follows runs with the ledger locked

    def _shortage(self, need: int) -> int:
        """How many bytes must go before `need` more may come."""
        over = self._ledger.used + need - self._max_size
        disk = os.statvfs(self._directory)
        if not disk.f_blocks:  # unbounded, or unwilling to tell
            return over
        return max(over, self._min_free + need - disk.f_bavail * disk.f_frsize)

    def _make_room(self, need: int) -> bool:
        """Evict until `need` more bytes fit, or nothing if all there is would not suffice."""
        if self._shortage(need) > 0 and not self._victims:
            self._recount()
        short = self._shortage(need)
        if short > self._ledger.used:
            return False
        self._evict(short)
        return self._shortage(need) <= 0

    def _evict(self, short: int) -> None:
        """Remove `short` bytes of objects, or all of them."""
        while short > 0 and (self._victims or self._recount()):
            used_ns, path = self._victims.popleft()
            short -= self._drop(path, used_ns) or 0

    def _drop(self, path: str, used_ns: int | None = None) -> int | None:
        """Remove an object, unless it was used after `used_ns`; return the bytes freed."""
        try:
            found = os.stat(path)
            if used_ns not in (None, found.st_mtime_ns):
                return None
            os.unlink(path)
        except FileNotFoundError:
            return None
        freed = _charge(found.st_size)
        self._ledger.used -= freed
        return freed

    def _recount(self) -> bool:
        """Charge what is really there and list what to remove first; False if there is nothing."""
        charged = 0

        def objects() -> Iterator[tuple[int, str]]:
            nonlocal charged
            for path, found in _files(self._directory):
                if path.endswith(".tmp"):
                    with suppress(FileNotFoundError):
                        if _is_abandoned(path, found):
                            os.unlink(path)
                            continue
                charged += _charge(found.st_size)
                if path.endswith(".kv"):
                    yield found.st_mtime_ns, path

        self._victims = deque(heapq.nsmallest(_VICTIMS, objects()))
        self._ledger.used = charged
        return bool(self._victims)


def touch(fd: int) -> None:
    """Note that an object is used now."""
    now = time.time_ns()
    os.utime(fd, ns=(now, now))


def _charge(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _create(path: str) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o600)
    except FileNotFoundError:
        parent = os.path.dirname(path)
        for directory in (os.path.dirname(parent), parent):
            with suppress(FileExistsError):
                os.mkdir(directory, 0o700)
        return os.open(path, flags, 0o600)


def _allocate(fd: int, size: int) -> None:
    """Give the file its size and, where the file system can, its blocks."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise
        os.ftruncate(fd, size)


def _files(
    directory: str, names: tuple[re.Pattern[str], ...] = _NAMES
) -> Iterator[tuple[str, os.stat_result]]:
    """Every file of ours that does not vanish before we look at it."""
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            if not names[0].fullmatch(entry.name):
                continue
            if len(names) > 1 and entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path, names[1:])
            elif len(names) == 1 and entry.is_file(follow_symlinks=False):
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                yield entry.path, found


def _is_abandoned(path: str, found: os.stat_result) -> bool:
    """Whether nobody writes this temporary file: its writer's lock on it dies with the writer."""
    if time.time() - found.st_mtime > _STALE_S:
        return True
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(fd)
