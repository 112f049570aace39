"""Writes complete chunks to every tier, off the hot path."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from lmcache.core.objects import Description, seal
from lmcache.core.pool import DaemonPool

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from lmcache.core.decider import Decider
    from lmcache.core.geometry import Geometry
    from lmcache.core.index import Slot
    from lmcache.core.tier import Tier


class TierWrites:
    """A bounded queue of chunks that stay pinned until they are written."""

    def __init__(self, decider: Decider, tiers: Sequence[Tier], threads: int, queue: int) -> None:
        self._decider = decider
        self._tiers = tiers
        self._queue = queue
        self.pool = DaemonPool(threads, "lmcache-tier-write")

    def offer(self, slot: Slot, geometry: Geometry) -> None:
        """Queue a complete slot. Called under the decider's lock."""
        if len(self.pool) >= self._queue:
            self._decider.counters.add("tier_dropped")
            return
        entry = self._decider.pin(slot.key)
        try:
            write = self.pool.submit(self._write, entry, slot, geometry)
        except RuntimeError:  # closed meanwhile
            self._decider.counters.add("tier_dropped")
            self._decider.unpin(entry)
            return
        write.add_done_callback(partial(self._written, entry))

    def _written(self, entry: int, write: Future[None]) -> None:
        if write.cancelled():
            self._decider.unpin(entry)

    def _write(self, entry: int, slot: Slot, geometry: Geometry) -> None:
        decider = self._decider
        view = decider.slab.view[slot.offset : slot.offset + slot.size]
        try:
            seal(view, Description.of(slot, geometry))
            for tier in self._tiers:
                kept = tier.ask(lambda backend: backend.put(slot.key, view), decider.counters)
                decider.counters.add("tier_written" if kept else "tier_dropped", 1, tier.name)
        finally:
            decider.unpin(entry)
