"""What is in the air: copies that movers were told to make and have not finished.

The decider and the movers share no queue: a step's instructions travel with the engine's own
metadata, and a mover answers by writing the step's number into its word of the slab. A slot or a
lease in the air is nobody else's until every mover has answered or is known to be dead.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lmcache.core.slab import MOVER_BYTES, WORD

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmcache.core.decider import Decider
    from lmcache.core.geometry import Geometry
    from lmcache.core.index import Slot
    from lmcache.core.leases import Lease


@dataclass(frozen=True)
class Flight:
    """The copies of one step."""

    number: int
    stores: list[Slot]
    """Reserved slots that the movers fill."""
    loads: list[Lease]
    loaded: list[Slot]
    """The slots the movers read, all covered by `loads`."""
    departed: float = field(default_factory=time.monotonic)


class Flights:
    """The steps sent to the movers of one engine, in order. Guarded by the decider's lock."""

    def __init__(self, decider: Decider, geometry: Geometry, movers: Sequence[int]) -> None:
        """`movers` are the numbers of its movers among all that map the slab."""
        self._decider = decider
        self._geometry = geometry
        self._movers = movers
        self.on_end: Callable[[Flight], None] | None = None
        """Told of each step that has ended, with only those of its stores that are complete."""
        self._air: deque[Flight] = deque()
        self._sent = 0

    def __len__(self) -> int:
        return len(self._air)

    def depart(self, stores: list[Slot], loads: list[Lease], loaded: list[Slot]) -> int:
        """Put a step in the air and return its number. Every mover must be sent it."""
        with self._decider.lock:
            self._sent += 1
            for lease in loads:
                lease.in_flight = True
            self._air.append(Flight(self._sent, stores, loads, loaded))
            return self._sent

    def settle(self) -> None:
        """Commit what has landed and end its leases."""
        if not self._air:
            return
        slab = self._decider.slab
        landed = min(slab.read_word(mover * MOVER_BYTES) for mover in self._movers)
        self._land(landed)

    def ground(self) -> None:
        """The movers are dead: whatever they had not completed never will be."""
        self._land(self._sent)

    def land(self, number: int) -> None:
        """One step has ended, whatever became of those before it: for a mover in this thread."""
        with self._decider.lock:
            flight = next(flight for flight in self._air if flight.number == number)
            self._air.remove(flight)
            self._end(flight)

    def _land(self, number: int) -> None:
        with self._decider.lock:
            while self._air and self._air[0].number <= number:
                self._end(self._air.popleft())

    def _end(self, flight: Flight) -> None:
        """Commit its stores, then end its leases, then look at what it loaded."""
        spoiled = any(
            self._decider.slab.read_word(mover * MOVER_BYTES + WORD.size) >= flight.number
            for mover in self._movers
        )
        with ExitStack() as last_first:  # an error in one of them must not leak the others
            if self.on_end:
                kept = [s for s in flight.stores if not spoiled and self._is_complete(s)]
                last_first.callback(self.on_end, replace(flight, stores=kept))
            for slot in flight.loaded:
                last_first.callback(self._check, slot)
            for lease in flight.loads:
                last_first.callback(self._decider.release, lease)
            for slot in reversed(flight.stores):
                last_first.callback(self._finish, slot, spoiled)

    def _check(self, slot: Slot) -> None:
        if not self._is_complete(slot):
            self._decider.counters.add("load_failures")
            self._decider.discard(slot.key, slot.generation)

    def _finish(self, slot: Slot, spoiled: bool) -> None:  # noqa: FBT001  a callback's argument
        if not spoiled and self._is_complete(slot):
            self._decider.counters.add("stored_tokens", self._geometry.tokens_in([slot]))
            self._decider.counters.add("stored_bytes", self._geometry.bytes_in([slot]))
            self._decider.commit(slot, self._geometry)
        else:
            self._decider.counters.add("store_failures")
            self._decider.abandon(slot)

    def _is_complete(self, slot: Slot) -> bool:
        slab, geometry = self._decider.slab, self._geometry
        return all(
            slab.read_word(slot.offset + geometry.tag_offset(i)) == slot.generation
            for i in range(len(geometry.slices))
        )
