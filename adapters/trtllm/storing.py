"""Which requests may still be being stored, as far as their leader can tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lmcache.adapters.trtllm.step import Step

AWAY = 4
"""Passes after which a request that is not in them is taken to have lost its blocks."""
CONFIRMED = 64
"""Passes that follow a store and tell the ranks that its request is running."""


@dataclass
class _Stored:
    last: int
    """The last pass that stored something of it."""
    seen: int
    """The last pass it was in."""


class Storing:
    """Tells the ranks, with each pass, who has kept its blocks and who may have lost them."""

    def __init__(self) -> None:
        self._requests: dict[int, _Stored] = {}
        self._gone: list[int] = []

    def lose(self, request_id: int) -> None:
        """It is without its blocks now."""
        if self._requests.pop(request_id, None):
            self._gone.append(request_id)

    def end(self, request_id: int) -> bool:
        """It has ended, with its blocks; whether ranks may still be storing some of them."""
        return self._requests.pop(request_id, None) is not None

    def tell(self, step: Step, number: int, requests: Iterable[int]) -> None:
        """Say so in the step of pass `number`, which these requests are in."""
        for request_id in requests:
            if stored := self._requests.get(request_id):
                stored.seen = number
                if number - stored.last <= CONFIRMED:
                    step.running.append(request_id)
        for request_id, stored in list(self._requests.items()):
            if number - stored.seen > AWAY:
                self.lose(request_id)
        step.gone, self._gone = self._gone, []
        for request_id, _ in step.stores:
            self._requests[request_id] = _Stored(number, number)
