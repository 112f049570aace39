"""Reads what the slab lacks from the tiers, each object into a slot of its own."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, wait
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from lmcache.core.log import init_logger
from lmcache.core.objects import Description, is_intact
from lmcache.core.pool import DaemonPool
from lmcache.core.receipts import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lmcache.core.backend import StorageBackend
    from lmcache.core.decider import Decider
    from lmcache.core.fetch import Fetch
    from lmcache.core.index import Slot
    from lmcache.core.keys import ChunkKey
    from lmcache.core.tier import Tier

logger = init_logger(__name__)

Answer = TypeVar("Answer")
_Read = Future[Reason]
"""Why an object was not read, or `NONE`."""

LOOK_S = 0.002
"""How often is looked for room, and for what others read."""


class TierReads:
    """The reading of fetches: a thread for each, which has the tiers' threads read objects."""

    def __init__(self, decider: Decider, tiers: Sequence[Tier], fetches: int) -> None:
        self._decider = decider
        self._tiers = tiers
        self.pool = DaemonPool(fetches, "lmcache-tier-fetch")
        self._coming: set[ChunkKey] = set()
        """What is being read, under the decider's lock."""
        self._waits: Fetch | None = None
        """Who holds something and waits for room, under the decider's lock: two could wait for
        each other."""

    def begin(self, fetch: Fetch) -> bool:
        """Read for `fetch` as soon as a thread is free; False if there is to be no more reading.

        The most urgent first, and of those the one whose deadline is nearest.
        """
        try:
            self.pool.submit(self._run, fetch, order=(fetch.priority, fetch.deadline))
        except RuntimeError:
            return False
        return True

    def is_coming(self, key: ChunkKey) -> bool:
        """Whether an object is being read."""
        return key in self._coming

    def _run(self, fetch: Fetch) -> None:
        fetch.started = True
        try:
            fetch.reason = self._read_on(fetch)
        finally:
            fetch.done.set()

    def _read_on(self, fetch: Fetch) -> Reason:
        """Read from whoever has most of the rest, again and again; why that came to an end."""
        want, step, best = fetch.want, 0, None
        while step < len(want.keys):
            best, count = self._longest(want.keys[step:], but=best)
            if best is None:
                return self._read_tail(fetch, step)
            reason = self._bring_all(best, fetch, range(step, step + count))
            step += count
            if reason is not Reason.NONE:
                fetch.reach = want.end(step)
                return reason
        return Reason.NONE

    def _longest(self, keys: list[ChunkKey], but: Tier | None) -> tuple[Tier | None, int]:
        """The tier with most of `keys` from the first on, and how many; `but` lacks the first."""
        best, most = None, 0
        for tier in self._tiers:
            if most < len(keys) and tier is not but:
                count = self._ask(tier, lambda backend: backend.count_leading(keys)) or 0
                if count > most:
                    best, most = tier, min(count, len(keys))
        return best, most

    def _read_tail(self, fetch: Fetch, step: int) -> Reason:
        """Nobody has object number `step`; read a shorter one. Why there is no more than that."""
        reason = Reason.TIER_FAILED if any(tier.failures for tier in self._tiers) else fetch.reason
        for pages in fetch.want.shorter(step):
            key = fetch.want.key(step, pages)
            for tier in self._tiers:
                if self._ask(tier, partial(_contains, key=key)):
                    brought = self._bring(tier, fetch, step, pages).result()
                    return reason if brought is Reason.NONE else brought
        return reason

    def _bring_all(self, tier: Tier, fetch: Fetch, steps: Iterable[int]) -> Reason:
        """Read these objects, several at a time, up to the first that cannot be had; why not."""
        coming: deque[_Read] = deque()
        reason, stopped = Reason.NONE, Reason.NONE
        for step in steps:
            if len(coming) == tier.depth:
                reason = coming.popleft().result()
            if reason is not Reason.NONE:
                break
            read = self._bring(tier, fetch, step, fetch.want.pages[step])
            if read.done() and read.result() is not Reason.NONE:
                stopped = read.result()
                break
            coming.append(read)
        for read in coming:  # each of them, whatever became of those before
            reason = read.result() if reason is Reason.NONE else reason
        wait(coming)
        return stopped if reason is Reason.NONE else reason

    def _bring(self, tier: Tier, fetch: Fetch, step: int, pages: int) -> _Read:
        """Begin to read object number `step`, cut to `pages` pages."""
        read: _Read = Future()
        reason, slot = self._place(fetch, step, pages)
        while slot is None and reason is None:
            time.sleep(LOOK_S)
            reason, slot = self._place(fetch, step, pages)
        if slot is None:
            read.set_result(reason or Reason.NONE)
            return read
        end = partial(self._end, read, tier, fetch, slot)
        try:
            job = tier.reads.submit(self._read, end, tier, fetch, slot)
        except RuntimeError:  # closed meanwhile
            end(Reason.TIER_FAILED)
        else:
            job.add_done_callback(lambda job: job.cancelled() and end(Reason.TIER_FAILED))
        return read

    def _place(self, fetch: Fetch, step: int, pages: int) -> tuple[Reason | None, Slot | None]:
        """A slot to read into, or why there is none; neither, if it is worth waiting."""
        decider, want, geometry = self._decider, fetch.want, fetch.geometry
        key, size = want.key(step, pages), geometry.slot_bytes(pages)
        with decider.lock:
            self._waits = None if self._waits is fetch else self._waits
            if fetch.abandoned:
                return Reason.TIMED_OUT, None
            if key in decider:
                lease = decider.lease(fetch.owner, [decider.find(key)], is_use=False)
                fetch.keep(lease, decider)
                fetch.held += size
                return Reason.NONE, None
            if decider.why_absent(key) is Reason.BEING_WRITTEN:
                is_worth = key in self._coming or fetch.may_wait_for_writer()
                return None if is_worth else Reason.BEING_WRITTEN, None
            if not fetch.has_window_for(size):
                return Reason.NO_ROOM, None
            slot = decider.place(key, geometry, pages, want.first_chunk + step, want.chain.root)
            if slot is not None:
                fetch.held, fetch.fetched = fetch.held + size, fetch.fetched + size
                self._coming.add(key)
            elif not fetch.may_wait(size, decider.capacity_bytes) or (fetch.held and self._waits):
                return Reason.NO_ROOM, None
            elif fetch.held:
                self._waits = fetch
            return None, slot

    def _read(self, end: Callable[[Reason], None], tier: Tier, fetch: Fetch, slot: Slot) -> None:
        reason = Reason.DAMAGED
        try:
            reason = self._fill(tier, fetch, slot)
        finally:
            end(reason)

    def _fill(self, tier: Tier, fetch: Fetch, slot: Slot) -> Reason:
        """Read an object straight into its slot and check every byte of it."""
        geometry = fetch.geometry
        about = Description.of(slot, geometry, fetch.want.chain.root)
        view = self._decider.slab.view[slot.offset : slot.offset + slot.size]
        size = self._ask(tier, lambda backend: backend.get_into(slot.key, view))
        if size is None:
            return Reason.TIER_FAILED if tier.failures else Reason.NEVER_STORED
        if size != slot.size or not is_intact(view, about):
            self._decider.counters.add("damaged", label=tier.name)
            logger.warning("tier %s held a damaged object: %s", tier.name, slot.key.hex())
            if tier.backend.capabilities.removal:
                self._ask(tier, lambda backend: backend.discard_damaged(slot.key))
            return Reason.DAMAGED
        for index in range(len(geometry.slices)):
            self._decider.slab.write_word(slot.offset + geometry.tag_offset(index), slot.generation)
        return Reason.NONE

    def _end(self, read: _Read, tier: Tier, fetch: Fetch, slot: Slot, reason: Reason) -> None:
        """Show everybody what was read into a slot, if it was."""
        decider, geometry = self._decider, fetch.geometry
        with decider.lock:
            self._coming.discard(slot.key)
            if reason is Reason.NONE:
                entry = decider.commit(slot, geometry, lacking=self._before(tier))
                fetch.keep(decider.lease(fetch.owner, [entry], is_use=False), decider)
                fetch.brought[slot.chunk] = tier.name, geometry.tokens_in([slot])
            else:
                decider.abandon(slot)
        read.set_result(reason)

    def _before(self, tier: Tier) -> int:
        """How many tiers may get what was read from `tier`: those before it, if it is exact."""
        return next(n for n, other in enumerate(self._tiers) if other is tier) * tier.exact

    def _ask(self, tier: Tier, call: Callable[[StorageBackend], Answer]) -> Answer | None:
        return tier.ask(call, self._decider.counters)


def _contains(backend: StorageBackend, key: ChunkKey) -> bool:
    return backend.contains(key)
