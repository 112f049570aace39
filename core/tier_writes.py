"""Writes complete chunks to the tiers, off the hot path."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

from lmcache.core.objects import seal
from lmcache.core.write_policy import Sightings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from concurrent.futures import Future

    from lmcache.core.decider import Decider
    from lmcache.core.index import Slot
    from lmcache.core.tier import Tier


class TierWrites:
    """A bounded queue for each tier, of chunks that stay pinned until they are written.

    What comes from outside comes under the decider's lock.
    """

    def __init__(self, decider: Decider, tiers: Sequence[Tier], queue: int) -> None:
        """At most `queue` chunks wait for a tier, in half of the slab, or all if it keeps none."""
        self._decider = decider
        self._queue = queue
        self._most_bytes = decider.capacity_bytes // (2 if decider.keep else 1)
        self._bytes = 0
        """Of the chunks that wait."""
        self._sightings = Sightings()
        self._early = [t for t in tiers if t.write.sightings == 1 and not t.write.at_eviction]
        self._frequent = [t for t in tiers if t.write.sightings > 1]
        self._late = [t for t in tiers if t.write.at_eviction]
        if tiers:
            decider.on_commit = self._committed
        if self._frequent:
            decider.on_use = self._used
        if self._late:
            decider.on_pressure = self._leaving

    def _committed(self, slot: Slot) -> None:
        """A chunk has become complete with bytes of an engine."""
        self._offer(slot, self._early)
        if self._frequent:
            self._see(slot)

    def _used(self, slots: Iterable[Slot]) -> None:
        """Chunks were found, or would have been stored again."""
        for slot in slots:
            self._see(slot)

    def _leaving(self, slots: Iterable[Slot]) -> None:
        """Chunks are the next to leave memory and have not been written where that is due now."""
        for slot in slots:
            self._offer(slot, self._late)

    def _see(self, slot: Slot) -> None:
        seen = self._sightings.add(slot.key)
        self._offer(slot, [tier for tier in self._frequent if tier.write.sightings == seen])

    def _offer(self, slot: Slot, tiers: Sequence[Tier]) -> None:
        chunk = _Chunk(self._decider, slot)
        for tier in tiers:
            self._enqueue(tier, chunk)

    def _enqueue(self, tier: Tier, chunk: _Chunk) -> None:
        size = chunk.slot.size
        is_full = self._bytes > 0 and self._bytes + size > self._most_bytes
        if is_full or len(tier.writes) >= self._queue:
            self._decider.counters.add("tier_dropped", label=tier.name)
            return
        entry = self._decider.pin(chunk.slot.key)
        self._bytes += size
        try:
            write = tier.writes.submit(self._write, entry, tier, chunk)
        except RuntimeError:  # closed meanwhile
            self._decider.counters.add("tier_dropped", label=tier.name)
            self._let_go(entry, size)
            return
        write.add_done_callback(partial(self._cancelled, entry, size))

    def _write(self, entry: int, tier: Tier, chunk: _Chunk) -> None:
        counters = self._decider.counters
        try:
            view = chunk.sealed()
            kept = tier.ask(lambda backend: backend.put(chunk.slot.key, view), counters)
            counters.add("tier_written" if kept else "tier_dropped", 1, tier.name)
        finally:
            self._let_go(entry, chunk.slot.size)

    def _cancelled(self, entry: int, size: int, write: Future[None]) -> None:
        if write.cancelled():
            self._let_go(entry, size)

    def _let_go(self, entry: int, size: int) -> None:
        with self._decider.lock:
            self._bytes -= size
            self._decider.unpin(entry)


class _Chunk:
    """A chunk that several tiers are to have, sealed by the first that comes to it."""

    def __init__(self, decider: Decider, slot: Slot) -> None:
        self.slot = slot
        self._view = decider.slab.view[slot.offset : slot.offset + slot.size]
        self._lock = threading.Lock()
        self._is_sealed = False

    def sealed(self) -> memoryview:
        """Its object, with the checksum in its header."""
        with self._lock:
            if not self._is_sealed:
                seal(self._view)
                self._is_sealed = True
        return self._view
