"""One engine joined to a decider: its movers, the slab they share, and the steps in the air."""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmcache.core.borrower import Borrower
from lmcache.core.client import CacheClient
from lmcache.core.errors import HandoverError
from lmcache.core.exchange import check_chunks
from lmcache.core.fetch import PLAIN, Asking
from lmcache.core.flights import Flights
from lmcache.core.geometry import Geometry, combined_layout, pages_per_chunk
from lmcache.core.handover import Grant, Visit, address_of
from lmcache.core.objects import layouts_text
from lmcache.core.slab import MAX_MOVERS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmcache.core.chain import KeyChain
    from lmcache.core.decider import Decider, Hit
    from lmcache.core.handover import Hello
    from lmcache.core.index import Slot
    from lmcache.core.receipts import Reason
    from lmcache.core.tiers import Tiers


def geometry_of(hellos: list[Hello], chunk_size: int) -> Geometry:
    """The objects of an engine with these movers. Raises `HandoverError` if they cannot share."""
    page_tokens = {hello.page_tokens for hello in hellos}
    if len(page_tokens) != 1 or min(page_tokens) < 1:
        raise HandoverError(f"movers have pages of {sorted(page_tokens)} tokens")
    if any(hello.number >= MAX_MOVERS for hello in hellos):
        raise HandoverError(f"{len(hellos)} movers; a slab has words for {MAX_MOVERS}")
    slices: dict[int, Hello] = {}
    for hello in sorted(hellos, key=lambda hello: hello.number):
        twin = slices.setdefault(hello.slice_index, hello)
        if (twin.page_bytes, twin.fingerprint) != (hello.page_bytes, hello.fingerprint):
            raise HandoverError(
                f"movers {twin.number} and {hello.number} hold one slice in two layouts"
            )
    if sorted(slices) != list(range(len(slices))):
        raise HandoverError(f"movers hold slices {sorted(slices)}; some are missing")
    ordered = [slices[i] for i in range(len(slices))]
    check_chunks(ordered[0].summary, chunk_size, ordered[0].page_tokens)
    return Geometry(
        page_tokens=ordered[0].page_tokens,
        pages_per_chunk=pages_per_chunk(chunk_size, ordered[0].page_tokens),
        slices=tuple(hello.page_bytes for hello in ordered),
        layout=combined_layout([hello.fingerprint for hello in ordered]),
        text=layouts_text([hello.summary for hello in ordered]),
    )


@dataclass
class Attachment(CacheClient):
    """An engine whose decider lives where it schedules: every question is a function call."""

    decider: Decider
    tiers: Tiers
    geometry: Geometry
    flights: Flights
    visits: list[Visit]
    borrowers: list[Borrower]
    """The movers in this process, of those that lend their pages."""
    number: int
    owned: bool = True
    """Whether the decider and its tiers end with it."""
    on_close: list[Callable[[], None]] = field(default_factory=list)
    """Called in turn when the attachment ends, while its tiers are still open."""

    @classmethod
    def open(
        cls,
        engine_id: str,
        movers: int,
        chunk_size: int,
        build: Callable[[Geometry], tuple[Decider, Tiers]],
        timeout_s: float,
        *,
        words: Sequence[int] | None = None,
    ) -> Attachment:
        """Visit every mover, have `build` make the decider, and hand its slab to all of them.

        Where several engines share a decider, `words` are the numbers of these movers among all,
        and the decider outlives the attachment. Raises `HandoverError` if a mover is missing; then
        nothing has been built or is kept.
        """
        numbers = range(movers) if words is None else words
        visits: list[Visit] = []
        borrowers: list[Borrower] = []
        built: tuple[Decider, Tiers] | None = None
        try:
            for number in range(movers):
                visits.append(Visit(address_of(engine_id, number), timeout_s))
            hellos = [visit.hello for visit in visits]
            if [hello.number for hello in hellos] != list(range(movers)):
                raise HandoverError(f"movers say they are {[hello.number for hello in hellos]}")
            geometry = geometry_of(hellos, chunk_size)
            built = decider, tiers = build(geometry)
            number = secrets.randbits(62) + 1
            writers = {hello.slice_index: hello.number for hello in reversed(hellos)}
            for visit in visits:
                grant = Grant(
                    attachment=number,
                    slab_bytes=decider.slab.size,
                    word=numbers[visit.hello.number],
                    pages_per_chunk=geometry.pages_per_chunk,
                    slices=geometry.slices,
                    layout=geometry.layout,
                    writes=writers[visit.hello.slice_index] == visit.hello.number,
                )
                if visit.hello.lends:
                    borrowers.append(Borrower(visit, grant, geometry, decider.slab))
                visit.grant(grant, None if visit.hello.lends else decider.slab.fd)
        except BaseException:
            for visit in visits:
                visit.close()
            for borrower in borrowers:
                borrower.close()
            if built and words is None:
                built[1].close()
                built[0].slab.close()
            raise
        flights = Flights(decider, geometry, numbers)
        return cls(
            decider, tiers, geometry, flights, visits, borrowers, number, owned=words is None
        )

    def lookup(self, owner: str, chain: KeyChain, stop: int, asking: Asking = PLAIN) -> Hit | None:
        """From the slab at once, from slower tiers later."""
        self.flights.settle()
        return self.tiers.lookup(owner, chain, self.geometry, stop, asking)

    def may_have(self, chain: KeyChain, stop: int) -> bool:
        """Whether every chunk before `stop` is in the slab, or slower tiers may have it."""
        self.flights.settle()
        return len(self.tiers) > 0 or self.decider.has_all(chain, stop)

    def keeps(self, hit: Hit, *, promised: bool = False) -> bool:
        """Look among the decider's leases; a promised one is as good as in the air."""
        with self.decider.lock:
            if hit.lease is None or hit.lease not in self.decider.leases:
                return False
            hit.lease.in_flight |= promised
            return True

    def release(self, owner: str, hit: Hit | None) -> None:
        """End its lease, and what is being fetched for its owner."""
        self.tiers.forget(owner)
        if hit:
            self.decider.release(hit.lease)

    def reserve(
        self, chain: KeyChain, start: int, stop: int, *, tail: bool
    ) -> tuple[list[Slot], Reason]:
        """Slots of the decider's slab, evicting what must go."""
        self.flights.settle()
        return self.decider.reserve(chain, self.geometry, start, stop, tail=tail)

    def depart(self, stores: Sequence[Slot], loads: Sequence[Hit]) -> int:
        """Their slots and leases are the movers' until they answer in the slab."""
        self.flights.settle()
        if not stores and not loads:
            return 0
        leases = [hit.lease for hit in loads if hit.lease]
        for lease in leases:
            self.tiers.forget(lease.owner)
        loaded = [slot for hit in loads for slot in hit.slots]
        return self.flights.depart(list(stores), leases, loaded)

    def cancel(self, stores: Sequence[Slot], loads: Sequence[Hit]) -> None:
        """Give all of it back to the decider."""
        for hit in loads:
            self.decider.release(hit.lease)
        for slot in stores:
            self.decider.abandon(slot)

    def is_whole(self) -> bool:
        """Whether every mover is alive. Never blocks."""
        return all(visit.is_alive() for visit in self.visits)

    def leave(self) -> None:
        """Have every mover let go of the slab. Never blocks."""
        for visit in self.visits:
            visit.leave()

    def is_silent(self) -> bool:
        """Whether no mover touches the slab any more: each has let go, or is dead. Never blocks."""
        visits = any(visit.is_alive() for visit in self.visits)
        return not visits and all(borrower.is_silent() for borrower in self.borrowers)

    def close(self) -> None:
        """Let go of the movers and the tiers. The slab goes with its last mapping."""
        with ExitStack() as stack:  # an error in one of them must not leak the others
            if self.owned:
                stack.callback(self.tiers.close)
            for borrower in self.borrowers:
                stack.callback(borrower.close)
            for visit in self.visits:
                stack.callback(visit.close)
            for call in reversed(self.on_close):
                stack.callback(call)
