"""Reads what the slab lacks from the tiers, each object into a slot of its own."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar

from lmcache.core.objects import Description, is_intact
from lmcache.core.pool import DaemonPool
from lmcache.core.receipts import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmcache.core.backend import StorageBackend
    from lmcache.core.decider import Decider
    from lmcache.core.fetch import Fetch
    from lmcache.core.geometry import Geometry
    from lmcache.core.index import Slot
    from lmcache.core.keys import ChunkKey
    from lmcache.core.tier import Tier

Answer = TypeVar("Answer")


class TierReads:
    """The reading of fetches. All but `begin` runs on threads of its own."""

    def __init__(self, decider: Decider, tiers: Sequence[Tier], threads: int) -> None:
        self._decider = decider
        self._tiers = tiers
        self.pool = DaemonPool(threads, "lmcache-tier-read")

    def begin(self, fetch: Fetch, geometry: Geometry) -> bool:
        """Read for `fetch` as soon as a thread is free; False if there is to be no more reading."""
        try:
            self.pool.submit(self._run, fetch, geometry)
        except RuntimeError:
            return False
        return True

    def _run(self, fetch: Fetch, geometry: Geometry) -> None:
        fetch.started = True
        try:
            fetch.reason = self._read_on(fetch, geometry)
        finally:
            fetch.done.set()

    def _read_on(self, fetch: Fetch, geometry: Geometry) -> Reason:
        """Read from whoever has most of the rest, again and again; why that came to an end."""
        want, step, best = fetch.want, 0, None
        while step < len(want.keys):
            best, count = self._longest(want.keys[step:], but=best)
            if best is None:
                return self._read_tail(fetch, geometry, step)
            for _ in range(count):
                reason = self._bring(best, fetch, geometry, step, want.pages[step])
                if reason is not Reason.NONE:
                    return reason
                step += 1
        return Reason.NONE

    def _longest(self, keys: list[ChunkKey], but: Tier | None) -> tuple[Tier | None, int]:
        """The tier with most of `keys` from the first on, and how many; `but` lacks the first."""
        best, most = None, 0
        for tier in self._tiers:
            if most < len(keys) and tier is not but:
                count = self._ask(tier, lambda backend: backend.count_leading(keys)) or 0
                if count > most:
                    best, most = tier, count
        return best, most

    def _read_tail(self, fetch: Fetch, geometry: Geometry, step: int) -> Reason:
        """Nobody has object number `step`; read a shorter one. Why there is no more than that."""
        reason = Reason.TIER_FAILED if any(tier.failures for tier in self._tiers) else fetch.reason
        for pages in fetch.want.shorter(step):
            key = fetch.want.key(step, pages)
            for tier in self._tiers:
                if self._ask(tier, partial(_contains, key=key)):
                    brought = self._bring(tier, fetch, geometry, step, pages)
                    return reason if brought is Reason.NONE else brought
        return reason

    def _bring(self, tier: Tier, fetch: Fetch, geometry: Geometry, step: int, pages: int) -> Reason:
        """Read object number `step`, cut to `pages` pages, into a slot of its own."""
        decider, key = self._decider, fetch.want.key(step, pages)
        with decider.lock:
            if fetch.abandoned:
                return Reason.TIMED_OUT
            if key in decider:
                fetch.keep(decider.lease(fetch.owner, [decider.find(key)]), decider)
                return Reason.NONE
            if decider.why_absent(key) is Reason.BEING_WRITTEN:
                return Reason.BEING_WRITTEN
            slot = decider.place(key, geometry, pages, fetch.want.first_chunk + step)
        if slot is None:
            return Reason.NO_ROOM
        reason = Reason.DAMAGED
        try:
            reason = self._read(tier, slot, geometry)
        finally:
            if reason is not Reason.NONE:
                decider.abandon(slot)
        if reason is not Reason.NONE:
            return reason
        with decider.lock:
            entry = decider.commit(slot, geometry, fresh=False)
            fetch.keep(decider.lease(fetch.owner, [entry]), decider)
        fetch.tokens[tier.name] += pages * geometry.page_tokens
        return Reason.NONE

    def _read(self, tier: Tier, slot: Slot, geometry: Geometry) -> Reason:
        """Read an object straight into its slot and check every byte of it."""
        view = self._decider.slab.view[slot.offset : slot.offset + slot.size]
        size = self._ask(tier, lambda backend: backend.get_into(slot.key, view))
        if size is None:
            return Reason.TIER_FAILED if tier.failures else Reason.NEVER_STORED
        if size != slot.size or not is_intact(view, Description.of(slot, geometry)):
            self._decider.counters.add("damaged", label=tier.name)
            if tier.backend.capabilities.removal:
                self._ask(tier, lambda backend: backend.remove(slot.key))
            return Reason.DAMAGED
        for index in range(len(geometry.slices)):
            self._decider.slab.write_word(slot.offset + geometry.tag_offset(index), slot.generation)
        return Reason.NONE

    def _ask(self, tier: Tier, call: Callable[[StorageBackend], Answer]) -> Answer | None:
        return tier.ask(call, self._decider.counters)


def _contains(backend: StorageBackend, key: ChunkKey) -> bool:
    return backend.contains(key)
