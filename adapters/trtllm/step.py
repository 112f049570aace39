"""What the leader tells every rank about one pass of TensorRT-LLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmcache.core.client import CacheClient
    from lmcache.core.decider import Hit
    from lmcache.core.index import Slot
    from lmcache.core.mover import Move


@dataclass
class Step:
    """Plain data: it is pickled."""

    attachment: int = 0
    number: int = 0
    """Of the step in that attachment; 0 if nobody waits for its end."""
    loads: list[tuple[int, list[Move]]] = field(default_factory=list)
    """What TensorRT-LLM counts on, by the attachment that holds it, which may have ended."""
    outside: list[tuple[int, int, list[Move]]] = field(default_factory=list)
    """Likewise for requests, named first, that wait for it outside the batch."""
    excused: list[int] = field(default_factory=list)
    """Requests that may wait so for nothing, as none of what they were promised was wanted."""
    stores: list[tuple[int, list[Move]]] = field(default_factory=list)
    """By request."""
    running: list[int] = field(default_factory=list)
    """Requests of this pass that the last one they were in has stored something of."""
    gone: list[int] = field(default_factory=list)
    """Such requests that may be in no pass any more."""
    pass_number: int = 0
    """Counted by the leader, from its first pass on."""
    broken: str = ""
    """Why something that TensorRT-LLM counts on cannot be had, if that is so."""


class Draft:
    """A step that is being planned; what it holds is given back if it does not depart."""

    def __init__(self, cache: CacheClient | None) -> None:
        self.step = Step()
        self.cache = cache
        self._hits: list[Hit] = []
        self._slots: list[Slot] = []

    def load(self, cache: CacheClient, hit: Hit, moves: list[Move]) -> None:
        """Have a hit of `cache`, which may have ended, loaded."""
        self.step.loads.append((cache.number, moves))
        self._take(cache, hit)

    def load_outside(
        self, request_id: int, cache: CacheClient, hit: Hit, moves: list[Move]
    ) -> None:
        """Likewise, for a request that is in no pass before."""
        self.step.outside.append((request_id, cache.number, moves))
        self._take(cache, hit)

    def _take(self, cache: CacheClient, hit: Hit) -> None:
        if cache is self.cache:
            self._hits.append(hit)

    def hold(self, slots: list[Slot]) -> None:
        """These are reserved, for moves that may follow."""
        self._slots += slots

    def depart(self) -> Step | None:
        """The step, on its way; None if there is nothing to do."""
        if self.cache:
            self.step.attachment = self.cache.number
            self.step.number = self.cache.depart(self._slots, self._hits)
        step = self.step
        loads = step.loads or step.outside or step.excused
        says = step.number or loads or step.broken or step.running or step.gone
        return step if says else None

    def cancel(self) -> None:
        """It will not be sent."""
        if self.cache:
            self.cache.cancel(self._slots, self._hits)
