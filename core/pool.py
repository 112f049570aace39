"""Threads for calls that may hang: nobody waits for them longer than they want to.

The threads of `concurrent.futures` are joined when the interpreter exits, however long it takes.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from functools import partial
from heapq import heappop, heappush
from itertools import count
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from lmcache.core.log import init_logger

if TYPE_CHECKING:
    from collections.abc import Callable

logger = init_logger(__name__)

_Job = tuple["Future[None]", "Callable[[], None]"]
Order = tuple[float, float]


class DaemonPool:
    """Runs jobs on at most `threads` threads, which end with the process whatever they do."""

    def __init__(self, threads: int, name: str) -> None:
        self._most = threads
        self._name = name
        self._threads: list[threading.Thread] = []
        self._queue: list[tuple[Order, int, _Job]] = []
        """A heap."""
        self._numbers = count()
        self._calls: SimpleQueue[bool] = SimpleQueue()
        """One for each job, and False for each thread that is to end."""
        self._pending: set[Future[None]] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __len__(self) -> int:
        """Jobs that have not ended."""
        return len(self._pending)

    def submit(
        self, job: Callable[..., None], *args: Any, order: Order = (0.0, 0.0)
    ) -> Future[None]:
        """Run `job(*args)` when a thread is free, the lowest `order` first, then who came first.

        Raises `RuntimeError` once the pool is closed.
        """
        future: Future[None] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the pool {self._name} is closed")
            if len(self._threads) < min(self._most, len(self._pending) + 1):
                self._start_thread()  # first: if it cannot, nothing has been submitted
            self._pending.add(future)
            future.add_done_callback(self._forget)
            work: _Job = (future, partial(job, *args))
            heappush(self._queue, (order, next(self._numbers), work))
            self._calls.put(True)
        return future

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the jobs submitted so far; whether all have ended."""
        with self._lock:
            pending = set(self._pending)
        ended, others = wait(pending, timeout_s)
        with self._lock:  # waiters are woken before callbacks are called
            self._pending -= ended
        return not others

    def close(self) -> None:
        """Cancel the jobs that have not begun, and have the threads end after the one at hand."""
        with self._lock:
            self._closed = True
            waiting, self._queue = self._queue, []
        for _, _, (future, _) in waiting:
            future.cancel()
            future.set_running_or_notify_cancel()  # or who waits for it waits for ever
        for _ in self._threads:
            self._calls.put(False)

    def join(self) -> None:
        """Wait for the threads to end, after `close`."""
        for thread in self._threads:
            thread.join()

    def _start_thread(self) -> None:
        number = len(self._threads)
        thread = threading.Thread(target=self._work, name=f"{self._name}-{number}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _forget(self, future: Future[None]) -> None:
        with self._lock:
            self._pending.discard(future)

    def _work(self) -> None:
        while self._calls.get():
            with self._lock:
                if not self._queue:  # it was cancelled
                    continue
                _, _, (future, call) = heappop(self._queue)
            if future.set_running_or_notify_cancel():
                try:
                    call()
                except Exception as error:
                    logger.exception("a job of %s failed", self._name)
                    future.set_exception(error)
                else:
                    future.set_result(None)
            del future, call  # or an idle thread keeps what they hold
