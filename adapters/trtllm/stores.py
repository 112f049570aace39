"""Stores that their own pass does not wait for, on every rank."""

from __future__ import annotations

import threading
import time
from concurrent.futures import wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lmcache.adapters.trtllm.outside import IDLE_S
from lmcache.core.log import init_logger, log_copies
from lmcache.core.pool import DaemonPool

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable
    from concurrent.futures import Future

    from lmcache.core.grants import Granted
    from lmcache.core.kernels.staging import Event
    from lmcache.core.mover import Move

logger = init_logger(__name__)

LOST_S = 5.0
"""How long a copy waits for a word about its request, if no pass follows that has one."""


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
    is_good: bool = False
    """Whether all of it was copied."""
    ended: float | None = None
    """When it was over, one way or the other."""

    def make(self) -> None:
        """Copy. Raises whatever goes wrong."""
        try:
            if self.waits:
                self.after.synchronize()
            started = time.perf_counter()
            size = self.granted.mover.store(self.moves, None, None if self.waits else self.after)
            self.is_good = True
            log_copies(logger, f"Stored {self.tokens} tokens", size, time.perf_counter() - started)
        finally:
            self.ended = time.monotonic()

    def end(self, *, counts: bool) -> None:
        """It is over: answer for this part of the step."""
        try:
            if counts and self.is_good:
                self.granted.mover.publish(self.moves)
        finally:
            self.granted.progress.end(self.step)


class Stores:
    """Copies blocks on a thread of its own, while the next pass is under way.

    TensorRT-LLM does not tell of every block that it takes back: a request may just stay away, and
    its blocks be another's before they have been copied. So a copy counts if its request is in a
    pass that has not ended when the copy has: then it had its blocks all the time. Or if it ended,
    and the leader has said that its blocks are its own until they have been read: see `Board`.
    """

    def __init__(self) -> None:
        self._pool = DaemonPool(1, "lmcache-stores")
        self._lock = threading.Lock()
        self._copies: dict[Copy, Future[None]] = {}
        """Those that nobody has had a word about."""
        self._kept: set[int] = set()
        """Requests that have ended, of which is to be told when their copies are made."""
        self._timer: threading.Timer | None = None

    def submit(self, copy: Copy) -> None:
        """Have it made. Raises `RuntimeError` after `close`."""
        with self._lock:
            self._watch()
            self._copies[copy] = self._pool.submit(copy.make)

    def afterwards(self, call: Callable[[], None]) -> None:
        """Have something called when the copies submitted so far are over, dropped or not.

        After `close` they are, and it is called at once.
        """
        try:
            self._pool.submit(call)
        except RuntimeError:
            call()

    def take_ended(self, named: Iterable[int], *, is_idle: bool) -> list[int]:
        """The requests, of those that are or were named, whose copies have all been made.

        Each is told of once, and is to be settled. Who has nothing else to do waits, but not for
        long.
        """
        self._kept.update(named)
        with self._lock:
            futures = [f for copy, f in self._copies.items() if copy.request in self._kept]
        if is_idle and futures:
            wait(futures, IDLE_S)
        with self._lock:
            busy = {copy.request for copy, f in self._copies.items() if not f.done()}
        ended = sorted(self._kept - busy)
        self._kept &= busy
        return ended

    def settle(self, requests: Container[int]) -> None:
        """Wait for the copies of these, who still have their blocks: what was copied counts."""
        copies = self._take(lambda copy: copy.request in requests)
        wait(copies.values())
        with ExitStack() as last_first:  # an error in one of them must not leave out the others
            for copy in reversed(copies):
                last_first.callback(copy.end, counts=True)

    def drop(self, requests: Container[int]) -> None:
        """These may have lost their blocks: what was copied does not count."""
        self._drop(lambda copy: copy.request in requests)

    def close(self) -> None:
        """Drop what has not begun, and return when the copy under way has ended."""
        self._pool.close()
        self._pool.join()
        with self._lock:
            self._copies.clear()
            if self._timer:
                self._timer.cancel()

    # ----

    def _take(self, which: Callable[[Copy], bool]) -> dict[Copy, Future[None]]:
        with self._lock:
            return {copy: self._copies.pop(copy) for copy in list(self._copies) if which(copy)}

    def _drop(self, which: Callable[[Copy], bool]) -> None:
        for copy, future in self._take(which).items():
            # a slot is in use until nobody writes to it any more
            future.add_done_callback(partial(_forget, copy))

    def _watch(self) -> None:
        """See to it that no copy waits for ever. With the lock held."""
        if self._timer is None:
            timer = threading.Timer(LOST_S, self._expire)
            timer.daemon = True
            timer.start()
            self._timer = timer

    def _expire(self) -> None:
        too_old = time.monotonic() - LOST_S
        self._drop(lambda copy: copy.ended is not None and copy.ended <= too_old)
        with self._lock:
            self._timer = None
            if self._copies:
                self._watch()


def _forget(copy: Copy, _: Future[None]) -> None:
    copy.end(counts=False)
