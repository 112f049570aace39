"""Loads of more than memory holds at once: window after window, while their requests wait."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lmcache.core.fetch import Asking
from lmcache.core.log import init_logger
from lmcache.core.receipts import Reason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lmcache.adapters.vllm.draft import Draft, Tracked


logger = init_logger(__name__)

STARVE_S = 10.0
"""How long a request may wait for room, while nothing of it comes, before it is computed."""
_MAY_COME = (Reason.NO_ROOM, Reason.BEING_WRITTEN)


class Streams:
    """The requests whose first window has departed. On the scheduler's thread."""

    def __init__(self) -> None:
        self._open: dict[str, Tracked] = {}
        self._left: list[str] = []
        self._starving: dict[str, float] = {}
        """Those for whose next window there was no room, and since when."""

    @property
    def starve(self) -> bool:
        """Whether others should let go of what they were not promised yet."""
        return bool(self._starving)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._open

    def begin(self, tracked: Tracked) -> None:
        """Its first window departs with the step at hand."""
        self._open[tracked.request.request_id] = tracked

    def advance(self, draft: Draft) -> list[str]:
        """Add the windows that have come to a step; the requests for which these are the last.

        A request to which nothing came ends here, too, and is not among them.
        """
        whole = []
        for request_id, tracked in list(self._open.items()):
            request = tracked.request
            asking = Asking(tracked.at, in_windows=True, priority=request.priority)
            hit = draft.cache.lookup(request_id, tracked.chain, tracked.found, asking)
            if hit is None:
                continue
            if not hit.tokens:
                draft.cache.release(request_id, hit)
                if hit.receipt.reason in _MAY_COME and self._may_wait(request_id):
                    continue
                why, rest = hit.receipt.reason.value, tracked.local + tracked.loaded - tracked.at
                logger.warning("Reqid: %s, %d tokens did not come: %s", request_id, rest, why)
            elif draft.load_window(tracked, hit):
                whole.append(request_id)
            else:
                self._starving.pop(request_id, None)
                continue
            self._end(request_id)
        return whole

    def _may_wait(self, request_id: str) -> bool:
        now = time.monotonic()
        return now - self._starving.setdefault(request_id, now) < STARVE_S

    def _end(self, request_id: str) -> bool:
        self._starving.pop(request_id, None)
        return self._open.pop(request_id, None) is not None

    def reached(self) -> Iterator[tuple[str, int]]:
        """The requests, and up to which token each has been loaded or will be."""
        for request_id, tracked in self._open.items():
            yield request_id, max(tracked.at, tracked.local)

    def leave(self, request_id: str) -> None:
        """The request has ended; its pages are vLLM's again once the windows under way are over."""
        if self._end(request_id):
            self._left.append(request_id)

    def take_left(self) -> list[str]:
        """Requests that left since the last call."""
        left, self._left = self._left, []
        return left

    def clear(self) -> None:
        """What was under way is lost; who waits for it is told as for any lost promise."""
        self._open.clear()
        self._starving.clear()
