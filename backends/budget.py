"""A directory of object files whose bytes are bounded for all processes that use it."""

from __future__ import annotations

import os
import secrets
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from lmcache.backends.ledger import Ledger
from lmcache.backends.survey import Candidate, Survey
from lmcache.backends.tree import DAMAGED, KEPT, allocate, charge_of, claim, leaf_of, path_of
from lmcache.core.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable

_DROPS = 256
"""Objects removed at a time where many must go, so that others get the ledger in between."""
ASIDE = 16
"""Damaged objects that stay for people to look at."""


class Reservation(NamedTuple):
    """A temporary file that has been charged for."""

    name: str
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
    leaves the sum too high, never too low, until a `Survey` puts it right: in the background after
    each start, and each time the known candidates for removal run out. Only a directory that has
    never been counted, or is over a bound, is looked through before it is opened. (When the power
    fails, so may the sum: what came in the last half a minute then counts after the survey.)

    A file is charged in blocks of 4 KiB; directories and the files of others are neither counted
    nor touched. An object that is read while it is evicted takes up space until the reader is done.
    Recency is the modification time of a file, so all processes share one order.
    """

    def __init__(self, directory: str, max_size: int, min_free: int) -> None:
        self._directory = directory
        self._max_size = max_size
        self._min_free = min_free
        self.ledger_path = f"{directory}/usage"
        self._ledger = Ledger(self.ledger_path)
        self._survey = Survey(directory, self._ledger)
        self._aside: dict[str, None] = {}
        """Which objects were set aside, in that order."""
        try:
            with self._ledger:
                is_counted = self._ledger.is_counted
            if not is_counted:
                self._survey.wait()
            self._shrink(self._excess)
            self._shrink(self._shortage)
            if is_counted:
                self._survey.begin()
        except BaseException:
            self.close()
            raise

    def path(self, name: str) -> str:
        """Where the object called `name`, 64 hex digits, is or would be."""
        self._ledger.check_open()
        return path_of(self._directory, name)

    def reserve(self, name: str, size: int, flags: int) -> Reservation | None:
        """Claim the bytes for an object; None if there is no room even after evicting.

        `flags` are for opening the file.
        """
        if charge_of(size) > self._max_size:
            return None
        stem = path_of(self._directory, name).removesuffix(".kv")
        path = f"{stem}.{secrets.token_hex(8)}.tmp"
        try:
            fd = claim(path, flags)
        except FileNotFoundError:
            with self._ledger:  # it knows whether the whole directory is gone
                raise
        try:
            if self._charge(leaf_of(name), fd, size):
                return Reservation(name, path, fd, charge_of(size))
        except BaseException:
            _discard(path, fd)
            raise
        _discard(path, fd)
        return None

    def _charge(self, leaf: int, fd: int, size: int) -> bool:
        """Charge for an empty file and give it its blocks; False if there is no room."""
        charge, more = charge_of(size), True
        while True:
            with self._ledger:
                fits = self._make_room(charge)
                if fits:
                    self._allocate(leaf, fd, size)
            if fits is not None:
                return fits
            if not more:
                return False
            more = self._survey.wait()

    def commit(self, reservation: Reservation) -> None:
        """Make a written reservation the object of its name, in place of any other."""
        path = path_of(self._directory, reservation.name)
        with self._ledger:
            try:
                replaced = charge_of(os.stat(path).st_size)
            except FileNotFoundError:
                replaced = 0
            os.replace(reservation.path, path)
            self._ledger.charge(leaf_of(reservation.name), -replaced)

    def cancel(self, reservation: Reservation) -> None:
        """Give a reservation back. If the ledger is gone, the next survey does it."""
        with suppress(BackendError, FileNotFoundError), self._ledger:
            os.unlink(reservation.path)
            self._ledger.charge(leaf_of(reservation.name), -reservation.charge)

    def remove(self, name: str) -> bool:
        """Remove the object called `name`, and what was set aside; return whether it was there."""
        with self._ledger:
            self._drop(name, DAMAGED)
            return self._drop(name) is not None

    def set_aside(self, name: str) -> bool:
        """Keep the object called `name` for people to look at; return whether it was there.

        Of those that this process has set aside the last `ASIDE` stay, until room is needed: they
        are the first to go.
        """
        path, aside = (path_of(self._directory, name, kind) for kind in (KEPT, DAMAGED))
        with self._ledger:
            if not os.path.exists(path):
                return False
            self._drop(name, DAMAGED)
            os.utime(path, ns=(0, 0))
            os.replace(path, aside)
            self._ledger.charge(leaf_of(name), 0)
            self._survey.candidates.appendleft(Candidate(0, name, DAMAGED))
            self._aside[name] = self._aside.pop(name, None)
            if len(self._aside) > ASIDE:
                oldest = next(iter(self._aside))
                del self._aside[oldest]
                self._drop(oldest, DAMAGED)
            return True

    def close(self) -> None:
        """Let go of the directory; closing twice is a no-op."""
        self._survey.close()
        self._ledger.close()

    def _shrink(self, shortage: Callable[[], int]) -> None:
        """Evict until nothing is short, or nothing can be done about it."""
        while True:
            with self._ledger:
                short = shortage()
                if not 0 < short <= self._ledger.used:
                    return
                is_done = self._evict(short, _DROPS) <= 0 or bool(self._survey.candidates)
            if not is_done and not self._survey.wait():
                return

    # all that follows runs with the ledger locked

    def _shortage(self, need: int = 0) -> int:
        """How many bytes must go before `need` more may come."""
        over = self._ledger.used + need - self._max_size
        disk = os.statvfs(self._directory)
        if not disk.f_blocks:  # unbounded, or unwilling to tell
            return over
        return max(over, self._min_free + need - disk.f_bavail * disk.f_frsize)

    def _excess(self) -> int:
        return self._ledger.used - self._max_size

    def _make_room(self, need: int) -> bool | None:
        """Evict until `need` more bytes fit; whether they do, or None if only a survey can tell."""
        short = self._shortage(need)
        if short <= 0:
            return True
        if short > self._ledger.used:
            return False
        if self._evict(short) > 0:
            return None
        return self._shortage(need) <= 0

    def _evict(self, short: int, most: int = sys.maxsize) -> int:
        """Remove `short` bytes of objects; return how many are missing when `most` are gone."""
        while short > 0 and most and (candidate := self._survey.next()):
            short -= self._drop(candidate.name, candidate.kind, candidate.used_ns) or 0
            most -= 1
        return short

    def _drop(self, name: str, kind: str = KEPT, used_ns: int | None = None) -> int | None:
        """Remove an object, unless it was used after `used_ns`; return the bytes freed."""
        path = path_of(self._directory, name, kind)
        try:
            found = os.stat(path)
            if used_ns not in (None, found.st_mtime_ns):
                return None
            os.unlink(path)
        except FileNotFoundError:
            return None
        freed = charge_of(found.st_size)
        self._ledger.charge(leaf_of(name), -freed)
        return freed

    def _allocate(self, leaf: int, fd: int, size: int) -> None:
        charge = charge_of(size)
        self._ledger.charge(leaf, charge)
        try:
            allocate(fd, size)
        except BaseException:
            os.ftruncate(fd, 0)
            self._ledger.charge(leaf, -charge)
            raise


def _discard(path: str, fd: int) -> None:
    os.close(fd)
    with suppress(FileNotFoundError):
        os.unlink(path)
