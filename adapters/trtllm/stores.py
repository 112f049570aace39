"""Stores that their own pass does not wait for, on every rank."""

from __future__ import annotations

import threading
import time
from concurrent.futures import wait
from contextlib import ExitStack
from dataclasses import dataclass, field
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

LOST_S = 30.0
"""How long a copy waits at least for a word about its request, if no pass follows that has one."""


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
    since: float = field(default_factory=time.monotonic)
    made: Future[None] | None = None
    """None if it has not begun."""
    is_good: bool = False
    """Whether all of it was copied."""

    @property
    def is_under_way(self) -> bool:
        """Whether it has begun and not ended."""
        return self.made is not None and not self.made.done()

    def make(self) -> None:
        """Copy. Raises whatever goes wrong."""
        if self.waits:
            self.after.synchronize()
        started = time.perf_counter()
        size = self.granted.mover.store(self.moves, None, None if self.waits else self.after)
        self.is_good = True
        log_copies(logger, f"Stored {self.tokens} tokens", size, time.perf_counter() - started)

    def end(self, *, counts: bool) -> None:
        """It is over: answer for this part of the step."""
        try:
            if counts and self.is_good:
                self.granted.mover.publish(self.moves)
        finally:
            self.granted.progress.end(self.step)


class Stores:
    """Copies blocks on a thread of its own, and none that its request may have lost.

    TensorRT-LLM does not tell of every block that it takes back: a request may just stay away, and
    its blocks be another's. So a copy is made when its request is known to have them: in the next
    pass that it is in, or when it ends and they are kept until this is over.
    """

    def __init__(self) -> None:
        self._pool = DaemonPool(1, "lmcache-stores")
        self._lock = threading.Lock()
        self._copies: list[Copy] = []
        """Those that nobody has answered for."""
        self._kept: set[int] = set()
        """Requests that have ended, of which is to be told when their copies are made."""
        self._timer: threading.Timer | None = None
        self._is_closed = False

    def start(self) -> None:
        """Have the thread, so that no later call fails for want of one."""
        self._pool.submit(lambda: None)

    def add(self, copy: Copy) -> None:
        """One to be made when there is a word about its request; after `close` it never is."""
        with self._lock:
            if not self._is_closed:
                self._watch()
                self._copies.append(copy)

    def copy(self, request: int) -> None:
        """Make the copies of one that is about to lose its blocks. Any thread may call this."""
        with self._lock:
            made = self._begin(lambda copy: copy.request == request)
        wait(made)

    def take_ended(self, named: Iterable[int], *, is_idle: bool) -> list[int]:
        """The requests, of those that are or were named, whose copies have all been made.

        Each is told of once, and is to be settled. Who has nothing else to do waits, but not for
        long.
        """
        self._kept.update(named)
        with self._lock:
            made = self._begin(lambda copy: copy.request in self._kept)
        if is_idle and made:
            wait(made, IDLE_S)
        with self._lock:
            busy = {copy.request for copy in self._copies if copy.is_under_way}
        ended = sorted(self._kept - busy)
        self._kept &= busy
        return ended

    def settle(self, requests: Container[int]) -> None:
        """Make the copies of these, who have their blocks, or had until they were made.

        They count.
        """
        with self._lock:
            made = self._begin(lambda copy: copy.request in requests)
            copies = self._take(lambda copy: copy.request in requests)
        wait(made)
        with ExitStack() as last_first:  # an error in one of them must not leave out the others
            for copy in reversed(copies):
                last_first.callback(copy.end, counts=True)

    def drop(self, requests: Container[int]) -> None:
        """These may have lost their blocks: what is not copied will not be, and nothing counts."""
        self._drop(lambda copy: copy.request in requests)

    def close(self) -> None:
        """Drop what has not begun, and return when the copy under way has ended."""
        with self._lock:
            self._is_closed = True
            self._copies.clear()
            if self._timer:
                self._timer.cancel()
        self._pool.close()
        self._pool.join()

    # ---- with the lock held

    def _begin(self, which: Callable[[Copy], bool]) -> list[Future[None]]:
        """Have those made."""
        made = []
        for copy in filter(which, self._copies):
            copy.made = copy.made or self._pool.submit(copy.make)
            made.append(copy.made)
        return made

    def _take(self, which: Callable[[Copy], bool]) -> list[Copy]:
        taken = list(filter(which, self._copies))
        self._copies = [copy for copy in self._copies if copy not in taken]
        return taken

    def _watch(self) -> None:
        """See to it that no copy waits for ever."""
        if self._timer is None:
            timer = threading.Timer(LOST_S, self._expire)
            timer.daemon = True
            timer.start()
            self._timer = timer

    # ----

    def _drop(self, which: Callable[[Copy], bool]) -> None:
        with self._lock:
            copies = self._take(which)
        for copy in copies:
            if copy.made:  # a slot is in use until nobody writes to it any more
                copy.made.add_done_callback(partial(_forget, copy))
            else:
                copy.end(counts=False)

    def _expire(self) -> None:
        too_old = time.monotonic() - LOST_S

        def is_lost(copy: Copy) -> bool:
            is_awaited = copy.is_under_way or copy.request in self._kept
            return copy.since <= too_old and not is_awaited

        self._drop(is_lost)
        with self._lock:
            self._timer = None
            if self._copies:
                self._watch()


def _forget(copy: Copy, _: Future[None]) -> None:
    copy.end(counts=False)
