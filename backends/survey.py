"""Looks through a directory of object files while others use it."""

from __future__ import annotations

import fcntl
import heapq
import os
import threading
import time
from collections import deque
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from lmcache.backends.tree import DAMAGED, KEPT, charge_of, files, leaves
from lmcache.core.errors import BackendClosed
from lmcache.core.pool import DaemonPool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from lmcache.backends.ledger import Ledger

_CANDIDATES = 32768
"""Kept from one survey: some 10 MB, and as many evictions share its cost."""
_STALE_S = 3600
_YOUNG_S = 60


class Candidate(NamedTuple):
    """An object that may have to go: first the one that was used the longest ago."""

    used_ns: int
    name: str
    kind: str = KEPT


class Survey:
    """Counts files again, leaf by leaf, and lists which objects to remove first.

    One at a time, on a thread of its own, which ends with the process whatever the disk does. No
    lock is held while a leaf is read. If the ledger says that it changed meanwhile, it is read
    again: a sum is put right only where it is certain, and so is never too low. A survey that
    nobody waits for rests half of the time, to leave the interpreter to others.
    """

    def __init__(self, directory: str, ledger: Ledger) -> None:
        self.candidates: deque[Candidate] = deque()
        """For whoever has the ledger locked."""
        self._directory = directory
        self._ledger = ledger
        self._found = 0
        self._pool = DaemonPool(1, "lmcache-survey")
        self._lock = threading.Lock()
        self._current: Future[None] | None = None
        self._waiting = 0
        self._closing = threading.Event()

    def begin(self) -> Future[None]:
        """Have a survey made in the background, unless one is under way."""
        with self._lock:
            if self._current is None or self._current.done():
                try:
                    self._current = self._pool.submit(self._run)
                except RuntimeError:
                    raise BackendClosed(f"{self._directory!r} is closed") from None
            return self._current

    def wait(self) -> bool:
        """Have a survey made now; whether it found candidates. Not with the ledger locked."""
        with self._lock:
            self._waiting += 1
        try:
            # one that was under way may have looked before there was anything
            for _ in range(2):
                self.begin().result()
                if self._found:
                    break
        except CancelledError:
            raise BackendClosed(f"{self._directory!r} is closed") from None
        finally:
            with self._lock:
                self._waiting -= 1
        return self._found > 0

    def next(self) -> Candidate | None:
        """Take the first candidate; None if all are gone. With the ledger locked."""
        if len(self.candidates) == self._found // 4:
            self.begin()  # so that nobody has to wait for more
        return self.candidates.popleft() if self.candidates else None

    def close(self) -> None:
        """End a survey that is under way, and wait for that; a second time does nothing."""
        self._closing.set()
        self._pool.close()
        self._pool.join()

    def _run(self) -> None:
        candidates = heapq.nsmallest(_CANDIDATES, self._objects())
        if not self._closing.is_set():
            with self._ledger:
                self._ledger.sum_up()
                self.candidates = deque(candidates)
                self._found = len(candidates)

    def _objects(self) -> Iterator[Candidate]:
        """Every object; each leaf is charged anew on the way."""
        with self._ledger:
            charged = {leaf for leaf, charge in enumerate(self._ledger.charges()) if charge}
        for leaf in sorted(charged.union(leaves(self._directory))):
            begun = time.monotonic()
            yield from self._count(leaf)
            rest_s = 0 if self._waiting else time.monotonic() - begun
            if self._closing.wait(rest_s):
                return

    def _count(self, leaf: int) -> list[Candidate]:
        """The objects in a leaf, which is then charged for all its files."""
        while True:
            with self._ledger:
                before = self._ledger.leaf(leaf)
            counted, found = 0, []
            for entry, status in files(self._directory, leaf):
                name, _, kind = entry.name.partition(".")
                if kind in (KEPT, DAMAGED):
                    found.append(Candidate(status.st_mtime_ns, name, kind))
                elif self._clear(leaf, entry.path):
                    continue
                counted += charge_of(status.st_size)
            with self._ledger:
                if self._ledger.settle(leaf, before, counted):
                    return found

    def _clear(self, leaf: int, path: str) -> bool:
        """Remove a temporary file that nobody writes; whether it is gone."""
        with self._ledger, suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                found = os.fstat(fd)
                age_s = time.time() - found.st_mtime
                # one that weighs nothing yet may be about to be locked
                if age_s <= _YOUNG_S and not found.st_size:
                    return False
                if age_s <= _STALE_S and _is_held(fd):
                    return False
                os.unlink(path)
                self._ledger.charge(leaf, -charge_of(found.st_size))
            finally:
                os.close(fd)
        return True


def _is_held(fd: int) -> bool:
    """Whether a temporary file is being written: its writer's lock dies with the writer."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
