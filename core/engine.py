"""The whole cache in one process: for tests, tools, and engines that schedule where they compute.

Where scheduling and pages are in different processes, an adapter uses the same `Decider`, `Tiers`
and `Mover` through an `Attachment` instead.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import chain as joined
from itertools import count
from typing import TYPE_CHECKING

from lmcache.core.chain import KeyChain
from lmcache.core.flights import Flights
from lmcache.core.geometry import Geometry, combined_layout, pages_per_chunk
from lmcache.core.keys import Identity, root_key
from lmcache.core.mover import HOLE, Move, Mover
from lmcache.core.objects import layouts_text
from lmcache.core.receipts import Reason, Receipt

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from lmcache.core.decider import Decider, Hit
    from lmcache.core.index import Slot
    from lmcache.core.keys import Insert, Namespace
    from lmcache.core.layout import PageLayout
    from lmcache.core.tiers import Tiers


def moves_for(
    slots: Sequence[Slot], geometry: Geometry, pages: Sequence[int], first: int, stop: int
) -> list[Move]:
    """Moves between `slots` and the engine pages of a sequence, from page `first` to `stop`.

    `pages` is the sequence's page table from its first token on.
    """
    return moves_for_groups(slots, geometry, [pages], first, stop)


def moves_for_groups(
    slots: Sequence[Slot],
    geometry: Geometry,
    tables: Sequence[Sequence[int]],
    first: int,
    stop: int,
) -> list[Move]:
    """Like `moves_for`, with a page table, which may have holes, for each cache group."""
    moves = []
    for slot in slots:
        start, held = slot.chunk * geometry.pages_per_chunk, geometry.pages_of(slot)
        low, high = max(start, first), min(start + held, stop)
        if low >= high:
            continue
        before, after = low - start, start + held - high
        parts = [[int(page) for page in table[low:high]] for table in tables]
        if len(parts) > 1:  # the next group's pages lie behind all of this one's
            parts = [[HOLE] * before + part + [HOLE] * after for part in parts]
            before = 0
        pages = list(joined.from_iterable(parts))
        moves.append(Move(slot.offset, slot.generation, held, before, pages))
    return moves


class CacheEngine:
    """Looks up, stores and retrieves the pages of one layout. Not for several threads at once."""

    def __init__(
        self,
        layout: PageLayout,
        namespace: Namespace,
        decider: Decider,
        tiers: Tiers,
        *,
        chunk_size: int = 256,
    ) -> None:
        """`namespace.layout` is set from `layout`. Takes over `decider` and `tiers`."""
        self.layout = layout
        self.geometry = Geometry(
            page_tokens=layout.page_tokens,
            pages_per_chunk=pages_per_chunk(chunk_size, layout.page_tokens),
            slices=(layout.stored_bytes,),
            layout=combined_layout([layout.fingerprint]),
            text=layouts_text([layout.summary]),
        )
        self.decider = decider
        self.tiers = tiers
        self._namespace = replace(namespace, layout=layout.fingerprint)
        self._mover = Mover(layout, self.geometry, decider.slab)
        self._flights = Flights(decider, self.geometry, [0])
        self._owners = count()

    def chain(
        self,
        tokens: Sequence[int],
        identity: Identity | None = None,
        inserts: Sequence[Insert] = (),
    ) -> KeyChain:
        """The keys of `tokens`. Keep it to avoid computing them twice."""
        return KeyChain(
            root_key(self._namespace, identity or Identity()),
            tokens,
            page_tokens=self.geometry.page_tokens,
            pages_per_chunk=self.geometry.pages_per_chunk,
            inserts=inserts,
        )

    def lookup(self, chain: KeyChain) -> Hit:
        """Lease the longest stored prefix, waiting for slower tiers. Retrieve or release it."""
        owner = str(next(self._owners))
        stop = len(chain.tokens)
        while (hit := self.tiers.lookup(owner, chain, self.geometry, stop)) is None:
            self.tiers.wait(owner)
        self.tiers.forget(owner)
        return hit

    def release(self, hit: Hit) -> None:
        """Give up a hit without retrieving it."""
        self.decider.release(hit.lease)

    def retrieve(self, hit: Hit, pages: Sequence[int], start: int = 0) -> Receipt:
        """Copy a hit into the engine's `pages` from token `start` on, and end its lease.

        `pages` is the page table of the sequence from its first token on. `tokens` of the receipt
        ends at the first page that could not be loaded; pages after it hold garbage.
        """
        layers = self._retrieve(hit, pages, start, [None])
        return _drain(layers)

    def retrieve_layers(
        self, hit: Hit, pages: Sequence[int], start: int = 0
    ) -> Generator[int, None, Receipt]:
        """Like `retrieve`, one region at a time: yields the index of each when it is there."""
        return self._retrieve(hit, pages, start, list(range(len(self.layout.regions))))

    def store(
        self, chain: KeyChain, pages: Sequence[int], start: int = 0, *, tail: bool = True
    ) -> Receipt:
        """Copy what is not stored yet of tokens `start` .. end out of the engine's `pages`.

        With `tail`, a last chunk of fewer pages is stored too; tokens beyond the last whole page
        never are.
        """
        return _drain(self._store(chain, pages, start, [None], tail=tail))

    def store_layers(
        self, chain: KeyChain, pages: Sequence[int], start: int = 0, *, tail: bool = True
    ) -> Generator[int, None, Receipt]:
        """Like `store`, one region at a time: each `next` copies one, which must be computed.

        Yields the index of the region to be copied next.
        """
        return self._store(chain, pages, start, list(range(len(self.layout.regions))), tail=tail)

    def close(self) -> None:
        """Finish what slower tiers are writing and free the slab."""
        try:
            self.tiers.close()
        finally:
            self._mover.close()

    def _retrieve(
        self, hit: Hit, pages: Sequence[int], start: int, regions: Sequence[int | None]
    ) -> Generator[int, None, Receipt]:
        started = time.perf_counter()
        first = start // self.geometry.page_tokens
        step = self._flights.depart([], [hit.lease] if hit.lease else [], hit.slots)
        size = 0
        failed: list[Move] = []
        try:
            moves = moves_for(hit.slots, self.geometry, pages, first, len(pages))
            for region in regions:
                copied, bad = self._mover.load(moves, region)
                size, failed = size + copied, failed + bad
                if region is not None:
                    yield region
        finally:
            self._flights.land(step)
        good = next((i for i, move in enumerate(moves) if move in failed), len(moves))
        loaded = sum(len(move.pages) for move in moves[:good]) * self.geometry.page_tokens
        asked = sum(len(move.pages) for move in moves) * self.geometry.page_tokens
        reason = Reason.LOAD_FAILED if failed else Reason.NONE
        spent = (time.perf_counter() - started) * 1e3
        by_tier = _stretch(hit.receipt.by_tier, first * self.geometry.page_tokens, loaded)
        return Receipt(loaded, asked, reason, by_tier, size, spent)

    def _store(
        self,
        chain: KeyChain,
        pages: Sequence[int],
        start: int,
        regions: Sequence[int | None],
        *,
        tail: bool,
    ) -> Generator[int, None, Receipt]:
        started = time.perf_counter()
        stop = min(len(chain.tokens), len(pages) * self.geometry.page_tokens)
        slots, reason = self.decider.reserve(chain, self.geometry, start, stop, tail=tail)
        step = self._flights.depart(slots, [], [])
        size = 0
        try:
            moves = moves_for(slots, self.geometry, pages, 0, len(pages))
            for region in regions:
                if region is not None:
                    yield region
                size += self._mover.store(moves, region)
            self._mover.publish(moves)
        finally:
            self._flights.land(step)
        stored = self.geometry.tokens_in(slots)
        spent = (time.perf_counter() - started) * 1e3
        return Receipt(stored, max(0, stop - start), reason, {"l1": stored}, size, spent)


def _stretch(by_tier: dict[str, int], start: int, length: int) -> dict[str, int]:
    """What each tier has of `length` tokens from `start` on; what L1 has comes first."""
    parts: dict[str, int] = {}
    low = 0
    for tier, tokens in by_tier.items():
        parts[tier] = max(0, min(low + tokens, start + length) - max(low, start))
        low += tokens
    return parts


def _drain(steps: Generator[int, None, Receipt]) -> Receipt:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            receipt: Receipt = end.value
            return receipt
