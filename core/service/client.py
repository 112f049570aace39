"""A scheduler's side of a server on the same machine: every question is one message, or none.

Nothing here raises for a server that is slow, gone or another one: such a cache has no hits and
stores nothing. What the server promised it keeps until the movers are silent, so a step may be sent
to them even when the server can no longer be told.
"""

from __future__ import annotations

import time
from itertools import count
from typing import TYPE_CHECKING

from lmcache.core.client import CacheClient
from lmcache.core.decider import Hit
from lmcache.core.errors import ConfigError, LateError, ServiceError
from lmcache.core.fetch import PLAIN, Asking
from lmcache.core.geometry import Geometry
from lmcache.core.leases import Lease
from lmcache.core.receipts import Reason, Receipt
from lmcache.core.service import wire
from lmcache.core.service.link import Link
from lmcache.core.service.lookups import Lookups, Question
from lmcache.core.service.told import Told

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.core.chain import KeyChain
    from lmcache.core.index import Slot

ATTACH_S = 15.0
"""The server visits every mover, after those of an earlier attachment have let go."""
INLINE_S = 0.002
"""How long a lookup may hold up the schedule for an answer that is likely to come."""
LEASE_MARGIN_S = 1.0


class ServiceClient(CacheClient):
    """One engine's side of one server, while both live."""

    def __init__(
        self, link: Link, attached: wire.Attached, deadline_s: float, patience_s: float
    ) -> None:
        """Use `open`."""
        self.geometry = Geometry(
            page_tokens=attached.page_tokens,
            pages_per_chunk=attached.pages_per_chunk,
            slices=tuple(attached.slices),
            layout=attached.layout,
        )
        self.number = attached.session
        self.about = attached
        self._link = link
        self._deadline_s = deadline_s
        self._patience_s = patience_s
        self._steps = count(1)
        self._told = Told()
        self._lookups = Lookups(link, self._told, attached, deadline_s)

    @classmethod
    def open(
        cls,
        endpoint: str,
        about: wire.Attach,
        deadline_s: float,
        *,
        patience_s: float | None = None,
    ) -> ServiceClient:
        """Attach the engine to the server at `endpoint`, which may take seconds.

        A call that takes longer than `deadline_s` is given up; a lookup is asked about again after
        `patience_s`, so that the engine can do other work meanwhile.
        Raises `ConfigError` if the server will never have it, `ServiceError` for all else.
        """
        link = Link(endpoint)
        try:
            answer = link.call(about, ATTACH_S)
            if isinstance(answer, wire.Refused):
                kind = ConfigError if answer.final else ServiceError
                raise kind(f"the server at {endpoint} refuses: {answer.why}")
            if not isinstance(answer, wire.Attached):
                raise ServiceError(f"{endpoint} answers {type(answer).__name__}")
        except BaseException:
            link.close()
            raise
        link.session = answer.session
        client = cls(link, answer, deadline_s, INLINE_S if patience_s is None else patience_s)
        link.orphan = client._give_back
        return client

    def lookup(self, owner: str, chain: KeyChain, stop: int, asking: Asking = PLAIN) -> Hit | None:
        """At once if the server answers at once; otherwise later."""
        length = stop - asking.start
        # while a load goes on there is always a next step to ask in
        patience_s = 0 if asking.start else self._patience_s
        try:
            found = self._lookups.answer(Question(owner, chain, stop, asking), patience_s)
        except ServiceError as error:
            late = isinstance(error, LateError)
            return _miss(length, Reason.TIMED_OUT if late else Reason.DEGRADED)
        try:
            return self._hit(owner, found) if found else None
        except ServiceError:  # a server that speaks in riddles
            self._link.is_lost = True
            return _miss(length, Reason.DEGRADED)

    def keeps(self, hit: Hit, *, promised: bool = False) -> bool:
        """By the lease's deadline, which the server is told of if it counts no more."""
        lease = hit.lease
        if lease is None or self._link.is_lost:
            return False
        if not lease.in_flight and time.monotonic() > lease.deadline:
            return False
        if promised and not lease.in_flight:
            lease.in_flight = True
            self._tell(wire.Promise(lease.number))
        return True

    def release(self, owner: str, hit: Hit | None) -> None:
        """Tell the server, if it knows of the owner."""
        self._forget()
        lease = hit.lease.number if hit and hit.lease else None
        if self._lookups.leave(owner) or lease is not None:
            self._tell(wire.Release(owner, lease))

    def reserve(
        self, chain: KeyChain, start: int, stop: int, *, tail: bool
    ) -> tuple[list[Slot], Reason]:
        """One round trip; nothing is stored if it takes too long."""
        if not self._link.is_up():  # before anything counts as told
            return [], Reason.DEGRADED
        sequence, more = self._told.tell(chain, stop)
        try:
            call = wire.Reserve(sequence=sequence, more=more, start=start, stop=stop, tail=tail)
            answer = self._link.call(call, self._deadline_s)
        except ServiceError:
            return [], Reason.DEGRADED
        if not isinstance(answer, wire.Reserved):
            return [], Reason.DEGRADED
        try:
            return answer.slots, wire.reason_of(answer.reason)
        except ServiceError:  # likewise; what it reserved it gives back when the session ends
            self._link.is_lost = True
            return [], Reason.DEGRADED

    def depart(self, stores: Sequence[Slot], loads: Sequence[Hit]) -> int:
        """The server counts the steps as we do."""
        self._forget()
        generations, leases = _numbers(stores, loads)
        if not generations and not leases:
            return 0
        number = next(self._steps)
        self._tell(wire.Depart(number=number, stores=generations, loads=leases))
        return number

    def cancel(self, stores: Sequence[Slot], loads: Sequence[Hit]) -> None:
        """The server gives all of it back to its decider."""
        generations, leases = _numbers(stores, loads)
        if generations or leases:
            self._tell(wire.Cancel(stores=generations, loads=leases))

    def is_whole(self) -> bool:
        """Whether the server still knows us. Never blocks."""
        return self._link.look()

    def close(self) -> None:
        """Detach."""
        self._tell(wire.Detach())
        self._link.close()

    # ----

    def _hit(self, owner: str, found: wire.Found) -> Hit:
        lease = None
        if found.lease is not None:
            deadline = time.monotonic() + self.about.lease_s - LEASE_MARGIN_S
            lease = Lease(owner, [], deadline, number=found.lease)
        return Hit(found.slots, lease, wire.receipt_of(found), found.more)

    def _forget(self) -> None:
        if ended := self._told.ended():
            self._tell(wire.Forget(ended))

    def _tell(self, body: wire.Request) -> None:
        """Send what has no answer; a server that cannot be told ends our session anyway."""
        try:
            self._link.tell(body)
        except ServiceError:
            return

    def _give_back(self, answer: wire.Reply) -> None:
        """An answer came when nobody waited for it any more."""
        if isinstance(answer, wire.Found) and answer.lease is not None:
            self._tell(wire.Cancel(loads=[answer.lease]))
        elif isinstance(answer, wire.Reserved) and answer.slots:
            self._tell(wire.Cancel(stores=[slot.generation for slot in answer.slots]))


def _numbers(stores: Sequence[Slot], loads: Sequence[Hit]) -> tuple[list[int], list[int]]:
    return [slot.generation for slot in stores], [hit.lease.number for hit in loads if hit.lease]


def _miss(stop: int, reason: Reason) -> Hit:
    return Hit([], None, Receipt(0, stop, reason))
