"""Stores that no pass waits for, on every rank."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcache.core.log import init_logger, log_copies
from lmcache.core.pool import DaemonPool

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lmcache.core.grants import Granted
    from lmcache.core.kernels.staging import Event
    from lmcache.core.mover import Move

logger = init_logger(__name__)

LOST_S = 5.0
"""How long a copy waits for its request to be seen, also where no pass follows."""


@dataclass(eq=False)
class Copy:
    """What one pass stores of one request."""

    request: int
    moves: list[Move]
    granted: Granted
    step: int
    """The number of the step that it is a part of."""
    tokens: int
    after: Event
    """What its pass has to reach first."""
    waits: bool
    """Whether we have to wait for that, as no device does."""
    over_at: float | None = None
    """When it ended."""
    is_good: bool = False
    """Whether all of it was copied."""

    def end(self, *, counts: bool) -> None:
        """Answer for this part of the step, once it is over."""
        if counts and self.is_good:
            self.granted.mover.publish(self.moves)
        self.granted.progress.end(self.step)


class Stores:
    """Copies blocks on a thread of its own, while their requests go on.

    TensorRT-LLM does not tell of every block that it takes back: a request may just stay away, and
    its blocks be another's before they have been copied. So a copy counts only if its request is
    `seen` after it has ended, as it then had its blocks all the time, or if they are kept for us.
    """

    def __init__(self) -> None:
        self._pool = DaemonPool(1, "lmcache-stores")
        self._lock = threading.Lock()
        self._copies: dict[int, list[Copy]] = {}
        """Those that count or not by what becomes of their requests."""
        self._kept: set[int] = set()
        """Requests whose blocks are kept until `take_done` has named them."""
        self._timer: threading.Timer | None = None
        self._is_closed = False

    def submit(self, copy: Copy) -> None:
        """Have it made. Raises `RuntimeError` after `close`."""
        with self._lock:
            self._pool.submit(self._make, copy)
            self._copies.setdefault(copy.request, []).append(copy)

    def seen(self, requests: Iterable[int]) -> None:
        """These are still running: what has been copied of them counts."""
        with self._lock:
            for request in requests:
                self._settle(request)

    def drop(self, requests: Iterable[int]) -> None:
        """These have lost their blocks, nobody knows when."""
        with self._lock:
            for request in requests:
                self._drop(request)

    def keep(self, requests: Iterable[int]) -> None:
        """These have ended, and their blocks are kept until `take_done` has named them."""
        with self._lock:
            self._kept.update(requests)
            for request in self._kept:
                self._settle(request)

    def take_done(self) -> list[int]:
        """Those of which nothing more is copied and whose blocks were kept; each is named once."""
        with self._lock:
            done = sorted(self._kept - self._copies.keys())
            self._kept.difference_update(done)
            return done

    def close(self) -> None:
        """Drop what has not begun, and return when the copy under way has ended."""
        with self._lock:
            self._is_closed = True
            if self._timer:
                self._timer.cancel()
        self._pool.close()
        self._pool.join()

    # ----

    def _make(self, copy: Copy) -> None:
        try:
            if copy.waits:
                copy.after.synchronize()
            started = time.perf_counter()
            size = copy.granted.mover.store(copy.moves, None, None if copy.waits else copy.after)
            copy.is_good = True
            spent = time.perf_counter() - started
            log_copies(logger, f"Stored {copy.tokens} tokens", size, spent)
        finally:
            self._over(copy)

    def _over(self, copy: Copy) -> None:
        with self._lock:
            copy.over_at = time.monotonic()
            if copy not in self._copies.get(copy.request, ()):
                copy.end(counts=False)
            elif copy.request in self._kept:
                self._settle(copy.request)
            else:
                self._watch()

    def _drop(self, request: int) -> None:
        """Nothing that is being copied of a request counts. With the lock held."""
        for copy in self._copies.pop(request, []):
            if copy.over_at:
                copy.end(counts=False)

    def _settle(self, request: int) -> None:
        """What has been copied of a request counts. With the lock held."""
        copies = self._copies.pop(request, [])
        under_way = [copy for copy in copies if not copy.over_at]
        if under_way:
            self._copies[request] = under_way
        for copy in copies:
            if copy.over_at:
                copy.end(counts=True)

    def _watch(self) -> None:
        """See to it that copies do not wait for ever. With the lock held."""
        if self._timer is None and not self._is_closed:
            self._timer = threading.Timer(LOST_S, self._expire)
            self._timer.daemon = True
            self._timer.start()

    def _expire(self) -> None:
        with self._lock:
            self._timer = None
            too_old = time.monotonic() - LOST_S
            for request, copies in list(self._copies.items()):
                if any(copy.over_at and copy.over_at <= too_old for copy in copies):
                    self._drop(request)
            if any(copy.over_at for copies in self._copies.values() for copy in copies):
                self._watch()
