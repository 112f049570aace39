"""Loads of more than memory holds at once: window after window, while their requests wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache.core.fetch import Asking

if TYPE_CHECKING:
    from lmcache.adapters.vllm.draft import Draft, Tracked


class Streams:
    """The requests whose first window has departed. On the scheduler's thread."""

    def __init__(self) -> None:
        self._open: dict[str, Tracked] = {}
        self._left: list[str] = []

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._open

    def begin(self, tracked: Tracked) -> None:
        """Its first window departs with the step at hand."""
        self._open[tracked.request.request_id] = tracked

    def advance(self, draft: Draft) -> None:
        """Add the windows that have come to a step; those of which nothing came end here."""
        for request_id, tracked in list(self._open.items()):
            request = tracked.request
            asking = Asking(tracked.at, in_windows=True, priority=request.priority)
            hit = draft.cache.lookup(request_id, tracked.chain, request.num_tokens, asking)
            if hit is None:
                continue
            if not hit.tokens:
                draft.cache.release(request_id, hit)
            elif not draft.load_window(tracked, hit):
                continue
            del self._open[request_id]

    def leave(self, request_id: str) -> None:
        """The request has ended; its pages are vLLM's again once the windows under way are over."""
        if self._open.pop(request_id, None):
            self._left.append(request_id)

    def take_left(self) -> list[str]:
        """Requests that left since the last call."""
        left, self._left = self._left, []
        return left

    def clear(self) -> None:
        """What was under way is lost; who waits for it is told as for any lost promise."""
        self._open.clear()
