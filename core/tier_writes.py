"""Writes complete chunks to the tiers, off the hot path."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

from lmcache.core.index import ALL
from lmcache.core.objects import seal
from lmcache.core.write_policy import Sightings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from concurrent.futures import Future

    from lmcache.core.backend import StorageBackend
    from lmcache.core.decider import Decider
    from lmcache.core.index import Slot
    from lmcache.core.tier import Tier
    from lmcache.core.write_policy import WritePolicy


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
        self._tiers = list(tiers)
        if tiers:
            decider.listeners.on_commit = self._committed
        self._counts = any(tier.write.sightings > 1 for tier in tiers)
        if self._counts:
            decider.listeners.on_use = self._used
        late = [number for number, tier in enumerate(tiers) if tier.write.at_eviction]
        if late:
            decider.listeners.on_pressure = self._leaving
            decider.listeners.late_from = late[0]

    def _committed(self, slot: Slot) -> None:
        """A chunk has become complete: an engine has stored it, or it was read from a tier.

        The latter is seen when whoever wanted it has found it.
        """
        is_new = self._decider.lacking(slot.key) == ALL
        seen = 1 if is_new else max(1, self._sightings.count(slot.key))
        self._offer(slot, lambda write: write.is_due(seen))
        if is_new and self._counts:
            self._see(slot)

    def _used(self, slots: Iterable[Slot]) -> None:
        """Chunks were found, or would have been stored again."""
        for slot in slots:
            self._see(slot)

    def _leaving(self, slots: Iterable[Slot]) -> None:
        """Chunks are the next to leave memory and have not been written where that is due now."""
        for slot in slots:
            self._offer(slot, lambda write: write.at_eviction)

    def _see(self, slot: Slot) -> None:
        seen = self._sightings.add(slot.key)
        self._offer(slot, lambda write: write.sightings == seen > 1)

    def _offer(self, slot: Slot, is_due: Callable[[WritePolicy], bool]) -> None:
        """To those of the tiers that may be given it for which it is due."""
        lacking = self._decider.lacking(slot.key)
        chunk = _Chunk(self._decider, slot, is_copy=lacking < ALL)
        for tier in self._tiers[:lacking]:
            if is_due(tier.write):
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
            has = chunk.is_copy and tier.ask(chunk.is_in, counters)
            kept = has is False and tier.ask(chunk.put_into, counters)
            if not has:
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

    def __init__(self, decider: Decider, slot: Slot, *, is_copy: bool) -> None:
        self.slot = slot
        self.is_copy = is_copy
        """Whether it was read from a tier, so that others may have it as well."""
        self._view = decider.slab.view[slot.offset : slot.offset + slot.size]
        self._lock = threading.Lock()
        self._is_sealed = False

    def is_in(self, backend: StorageBackend) -> bool:
        """Whether a backend has it."""
        return backend.contains(self.slot.key)

    def put_into(self, backend: StorageBackend) -> bool:
        """Write its object, with the checksum in its header; whether there was room for it."""
        with self._lock:
            if not self._is_sealed:
                seal(self._view)
                self._is_sealed = True
        return backend.put(self.slot.key, self._view)
