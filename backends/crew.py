"""Several jobs at once, without waiting for a thread that somebody else keeps busy."""

from __future__ import annotations

from collections import deque
from concurrent.futures import wait
from typing import TYPE_CHECKING

from lmcache.core.errors import BackendError
from lmcache.core.pool import DaemonPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future


class Crew:
    """Threads that help whoever has several jobs; it does them itself if all of them are busy.

    So a store that hangs costs a caller no more than its own jobs, whatever others wait for.
    """

    def __init__(self, size: int, name: str) -> None:
        """At most `size` jobs of a caller are done at once, one of them by itself."""
        self._helpers = size - 1
        self._pool = DaemonPool(self._helpers, name)

    def do(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Do `jobs`, begun in their order. After a failure none begins; the first one is raised.

        When this returns or raises, no job runs any more. Raises `RuntimeError` once closed.
        """
        queue = deque(jobs)
        failures: list[BackendError] = []

        def work() -> None:
            while queue and not failures:
                try:
                    job = queue.popleft()
                except IndexError:  # another thread was faster
                    return
                try:
                    job()
                except BackendError as failure:
                    failures.append(failure)

        futures: list[Future[None]] = []
        try:
            for _ in range(min(self._helpers, len(queue) - 1)):
                futures.append(self._pool.submit(work))
            work()
        finally:
            queue.clear()
            wait([future for future in futures if not future.cancel()])
        if failures:
            raise failures[0]

    def close(self) -> None:
        """Have the threads end after the jobs at hand."""
        self._pool.close()
