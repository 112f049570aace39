"""Which requests have had something stored, and may have lost their blocks since."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lmcache.adapters.trtllm.step import Step

AWAY = 4
"""Passes after which a request that is not in them is taken to have lost its blocks."""


class Storing:
    """Tells the ranks who still has them, with the next pass that each request is in."""

    def __init__(self) -> None:
        self._requests: dict[int, int] = {}
        """By request, the pass that stored something of it, if it was in none since."""
        self._gone: list[int] = []

    def lose(self, request_id: int) -> None:
        """A request is without its blocks now."""
        if self._requests.pop(request_id, None):
            self._gone.append(request_id)

    def unsaid(self, request_id: int) -> int:
        """The pass that stored something of a request, if it has been in none since; or 0."""
        return self._requests.get(request_id, 0)

    def end(self, request_id: int) -> None:
        """The ranks will be asked about a request, so nothing has to be said of it."""
        self._requests.pop(request_id, None)

    def tell(self, step: Step, requests: Iterable[int]) -> list[int]:
        """Say so in the step of a pass that these requests are in.

        Returns those that have been away for too long.
        """
        number = step.pass_number
        step.running += [request for request in requests if self._requests.pop(request, None)]
        away = [request for request, last in self._requests.items() if number - last > AWAY]
        for request in away:
            self.lose(request)
        step.gone, self._gone = self._gone, []
        self._requests.update((request, number) for request, _ in step.stores)
        return away

    def take_back(self, step: Step) -> None:
        """It will not be sent: of whom it speaks, nobody has been told."""
        self._gone += step.running + step.gone
