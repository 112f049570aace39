"""Loads that no forward pass waits for: requests wait for them outside the batch."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from lmcache.adapters.vllm.loads import load_copy
from lmcache.core.log import init_logger
from lmcache.core.mover import pages_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lmcache.adapters.vllm.step import Copy, Step
    from lmcache.core.grants import Progress
    from lmcache.core.kernels.staging import Event
    from lmcache.core.lender import Lender
    from lmcache.core.mover import Mover

logger = init_logger(__name__)


IDLE_S = 0.002
"""An engine that asks all the time keeps the interpreter's lock from the thread that copies."""


class _Load(NamedTuple):
    copy: Copy
    mover: Mover | Lender
    progress: Progress
    step: int
    after: Event | None


@dataclass
class _Waiting:
    """A request that waits for loads."""

    loads: int = 0
    """That are to be made."""
    is_last: bool = False
    """Whether no more will come."""
    failed: set[int] = field(default_factory=set)


class OutsideLoads:
    """Makes loads one after another on a thread, and says which requests have theirs."""

    def __init__(self) -> None:
        self.by_request = False
        """Whether a request that lacks a page can use none of what was loaded for it."""
        self._queue: SimpleQueue[_Load | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._heard = threading.Condition(self._lock)
        self._waiting: dict[str, _Waiting] = {}
        self._received: set[str] = set()
        self._failed_pages: set[int] = set()
        self._failed_requests: set[str] = set()
        self._thread: threading.Thread | None = None

    def submit(self, step: Step, mover: Mover | Lender, progress: Progress) -> None:
        """Load what the step says, each load a part of its progress."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lmcache-loads", daemon=True)
            self._thread.start()
        after = mover.mark()
        for copy in step.loads:
            with self._lock:
                self._waiting.setdefault(copy.request_id, _Waiting()).loads += 1
            self._queue.put(_Load(copy, mover, progress, step.number, after))

    def refuse(self, requests: Iterable[str], pages: Iterable[int]) -> None:
        """These requests will not get their loads, or no more of them: pages are as they were."""
        with self._lock:
            names = list(requests)
            if not names:
                self._failed_pages.update(pages)
            for name in names:
                waiting = self._waiting.setdefault(name, _Waiting())
                waiting.is_last = True
                waiting.failed.update(pages)
                self._hear(name, waiting)

    def miss(self, copies: Iterable[Copy]) -> None:
        """These loads will not be made; whether others of their requests follow, they say."""
        for copy in copies:
            self._ended(copy, pages_of(copy.moves), loads=0)

    def _ended(self, copy: Copy, failed: list[int], loads: int = 1) -> None:
        """A load has ended; its request has what it waits for if it was the last."""
        with self._lock:
            waiting = self._waiting.setdefault(copy.request_id, _Waiting())
            waiting.loads -= loads
            waiting.is_last |= copy.is_last
            waiting.failed.update(failed)
            self._hear(copy.request_id, waiting)

    def _hear(self, request: str, waiting: _Waiting) -> None:
        """Tell vLLM of a request as soon as nothing is copied to its pages any more."""
        if waiting.loads or not waiting.is_last:
            return
        del self._waiting[request]
        self._received.add(request)
        self._heard.notify()
        if not self.by_request:
            self._failed_pages.update(waiting.failed)
        elif waiting.failed:
            self._failed_requests.add(request)

    def take_received(self, *, is_idle: bool = False) -> set[str]:
        """The requests whose loads have ended since the last call, well or not.

        Who has nothing else to do waits for a load under way, but not for long.
        """
        with self._lock:
            if is_idle and self._waiting and not self._received:
                self._heard.wait(IDLE_S)
            received, self._received = self._received, set()
            return received

    def take_failed_pages(self) -> set[int]:
        """The pages that could not be filled, of all requests taken so far at least."""
        with self._lock:
            failed, self._failed_pages = self._failed_pages, set()
            return failed

    def take_failed_requests(self) -> set[str]:
        """Those that did not get what they waited for, of all taken so far at least."""
        with self._lock:
            failed, self._failed_requests = self._failed_requests, set()
            return failed

    def close(self) -> None:
        """End the thread after the load at hand."""
        if self._thread:
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (load := self._queue.get()) is not None:
            failed = pages_of(load.copy.moves)
            try:
                failed = load_copy(load.mover, load.copy, load.after)
            except Exception:
                logger.exception("a load failed")
            finally:
                self._ended(load.copy, failed)
                load.progress.end(load.step)
