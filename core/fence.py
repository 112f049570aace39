"""Stores that the engine does not wait for, unless it is about to write to the pages they read."""

from __future__ import annotations

from concurrent.futures import wait
from typing import TYPE_CHECKING

from lmcache.core.pool import DaemonPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future


class Fence:
    """Runs stores in order on a thread of its own. To be used from one thread."""

    def __init__(self) -> None:
        self._pool = DaemonPool(1, "lmcache-stores")
        self._reader: dict[int, Future[None]] = {}
        """The last store that reads a page, which may be over."""

    def submit(self, store: Callable[[], None], pages: Iterable[int]) -> None:
        """Have a store made that reads `pages`."""
        if not len(self._pool):
            self._reader.clear()
        self._reader.update(dict.fromkeys(pages, self._pool.submit(store)))

    def wait_for(self, pages: Iterable[int]) -> None:
        """Return when no store reads any of `pages` any more."""
        if self._reader:
            wait({self._reader.pop(page) for page in pages if page in self._reader})

    def close(self) -> None:
        """Drop the stores that have not begun, and return when the one under way has ended."""
        self._pool.close()
        self._pool.join()
        self._reader.clear()
