"""One engine at the server: the sequences it told us of, and what it holds."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmcache.core.errors import ServiceError
from lmcache.core.fetch import Asking
from lmcache.core.log import init_logger
from lmcache.core.service import wire
from lmcache.core.service.sequences import UnknownError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lmcache.core.attachment import Attachment
    from lmcache.core.chain import KeyChain
    from lmcache.core.decider import Hit
    from lmcache.core.flights import Flight
    from lmcache.core.index import Slot
    from lmcache.core.service.sequences import Sequences

logger = init_logger(__name__)

MAX_LOOKUPS = 65_536
"""That are under way, or whose leases have neither departed nor ended."""


@dataclass(frozen=True)
class Waiting:
    """A lookup whose answer is still to come."""

    number: int
    chain: KeyChain
    stop: int
    asking: Asking


@dataclass
class Session:
    """Answers one engine's calls out of its attachment. Called on the server's thread."""

    about: wire.Attach
    attachment: Attachment
    words: list[int]
    """Its movers' words in the slab."""
    peer: int
    """The connection its answers go to."""
    sequences: Sequences
    hits: dict[int, Hit] = field(default_factory=dict)
    """Leases that have not departed, by number."""
    reserved: dict[int, Slot] = field(default_factory=dict)
    """Slots that have not departed, by generation."""
    waiting: dict[str, Waiting] = field(default_factory=dict)
    """Lookups that wait for slower tiers, by owner."""
    owners: set[str] = field(default_factory=set)
    """Those that have looked something up, for each of whom slower tiers are asked only once."""

    def __post_init__(self) -> None:
        """Say what becomes of its steps."""
        self.attachment.flights.on_end = self._log

    @property
    def number(self) -> int:
        """What its calls and its movers' steps name."""
        return self.attachment.number

    def answer(self, number: int, body: wire.Request) -> wire.Reply | None:
        """Do as it asks; None where no answer is due.

        Raises `ServiceError` for what makes no sense, and `UnknownError` if it must begin anew.
        """
        match body:
            case wire.Lookup():
                return self._lookup(number, body)
            case wire.Reserve():
                return self._reserve(body)
            case wire.Promise():
                if hit := self.hits.get(body.lease):
                    self.attachment.keeps(hit, promised=True)
            case wire.Release():
                self._release(body)
            case wire.Depart():
                self._depart(body)
            case wire.Cancel():
                self.attachment.cancel(*self._take(body.stores, body.loads))
            case wire.Forget():
                for sequence in body.sequences:
                    self.sequences.drop(sequence)
            case _:
                raise ServiceError(f"{type(body).__name__} is not for a session")
        return None

    def late(self) -> Iterator[tuple[int, wire.Found]]:
        """The lookups that have been waiting and need not wait any longer."""
        for owner, waiting in list(self.waiting.items()):
            hit = self.attachment.lookup(
                self.label(owner), waiting.chain, waiting.stop, waiting.asking
            )
            if hit is not None:
                del self.waiting[owner]
                brought = {t: n for t, n in hit.receipt.by_tier.items() if n and t != "l1"}
                if brought:
                    logger.info("Prefetched %s tokens for %s", brought, self.about.name)
                yield waiting.number, self._found(hit)

    def label(self, owner: str) -> str:
        """What the owner is called among those of all engines."""
        return f"{self.about.name}/{self.number:x}/{owner}"

    def end(self) -> None:
        """No mover touches the slab any more: give back all that the engine held."""
        self.attachment.flights.ground()
        for owner in self.owners:
            self.attachment.release(self.label(owner), None)
        self.attachment.cancel(list(self.reserved.values()), list(self.hits.values()))
        self.attachment.close()

    # ----

    def _lookup(self, number: int, call: wire.Lookup) -> wire.Reply:
        chain = self.sequences.told(call.sequence, call.more)
        if call.start % chain.chunk_tokens or call.start > call.stop:
            raise ServiceError(f"a lookup of tokens {call.start} to {call.stop}")
        stop = self._answerable(call.start, call.stop)
        is_known = len(chain.tokens) >= stop
        if call.more:
            self.sequences.take_keys(chain, keep=is_known)
        if not is_known and self.attachment.may_have(chain, len(chain.tokens)):
            return wire.Lacking()
        asking = Asking(call.start, call.in_windows, call.priority)
        self._check_lookups()
        self.owners.add(call.owner)
        hit = self.attachment.lookup(self.label(call.owner), chain, stop, asking)
        if hit is None:
            self.waiting[call.owner] = Waiting(number, chain, stop, asking)
            return wire.Fetching()
        return self._found(hit)

    def _check_lookups(self) -> None:
        if len(self.hits) >= MAX_LOOKUPS:
            leases = self.attachment.decider.leases
            self.hits = {number: hit for number, hit in self.hits.items() if hit.lease in leases}
        if max(len(self.owners), len(self.hits)) >= MAX_LOOKUPS:
            raise UnknownError(f"more than {MAX_LOOKUPS} lookups")

    def _found(self, hit: Hit) -> wire.Found:
        if hit.lease is not None:
            self.hits[hit.lease.number] = hit
        return wire.found(hit)

    def _reserve(self, call: wire.Reserve) -> wire.Reply:
        chain = self.sequences.told(call.sequence, call.more)
        if len(chain.tokens) < call.stop:
            raise UnknownError("a sequence")
        if call.more and call.more.at == 0:
            self.sequences.take_keys(chain)
        stop = self._answerable(call.start, call.stop)
        slots, reason = self.attachment.reserve(chain, call.start, stop, tail=call.tail)
        self.reserved.update((slot.generation, slot) for slot in slots)
        return wire.Reserved(slots, reason.name)

    def _answerable(self, start: int, stop: int) -> int:
        """Where tokens `start` .. `stop` must end for one answer to have room for their slots."""
        size = self.attachment.geometry.chunk_tokens
        return min(stop, (start // size + wire.MAX_SLOTS) * size)

    def _log(self, flight: Flight) -> None:
        geometry = self.attachment.geometry
        spent = time.monotonic() - flight.departed
        for what, slots in (("Retrieved", flight.loaded), ("Stored", flight.stores)):
            if slots:
                tokens = geometry.tokens_in(slots)
                logger.info(
                    "%s %d tokens in %.3f seconds (%s)", what, tokens, spent, self.about.name
                )

    def _release(self, call: wire.Release) -> None:
        self.waiting.pop(call.owner, None)
        self.owners.discard(call.owner)
        hit = None if call.lease is None else self.hits.pop(call.lease, None)
        self.attachment.release(self.label(call.owner), hit)

    def _depart(self, call: wire.Depart) -> None:
        number = self.attachment.depart(*self._take(call.stores, call.loads))
        if not number:  # of leases that are gone; the step is sent all the same, and counts
            number = self.attachment.flights.depart([], [], [])
        if number != call.number:
            raise UnknownError(f"step {call.number}, where {number} was due")

    def _take(self, stores: Iterable[int], loads: Iterable[int]) -> tuple[list[Slot], list[Hit]]:
        """Slots and hits of these numbers, no longer ours. A lease may have met its deadline."""
        wanted = list(stores)
        # all or nothing: what was taken for a call that is refused would be nobody's
        if len(set(wanted)) < len(wanted) or not self.reserved.keys() >= set(wanted):
            raise UnknownError("a slot that is not reserved")
        slots = [self.reserved.pop(generation) for generation in wanted]
        return slots, [self.hits.pop(lease) for lease in loads if lease in self.hits]
