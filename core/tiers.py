"""Slower tiers behind the slab: written to as chunks become complete, read when the slab misses.

Nothing here runs on the caller's thread except a look at what a worker thread has done.
"""

from __future__ import annotations

import atexit
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from lmcache.core.errors import BackendError
from lmcache.core.fetch import PLAIN, Asking, Fetch, Want
from lmcache.core.receipts import Reason
from lmcache.core.tier_reads import TierReads
from lmcache.core.tier_writes import TierWrites

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.core.chain import KeyChain
    from lmcache.core.decider import Decider, Hit
    from lmcache.core.geometry import Geometry
    from lmcache.core.tier import Tier

_LACKING = (Reason.NEVER_STORED, Reason.EVICTED, Reason.BEING_WRITTEN)
ROOM_S = 0.1
"""How long the next window of a load waits for room before its owner hears that there is none: it
can have others make some."""
CLOSE_S = 10.0
"""How long `close` waits for a backend."""


class Tiers:
    """The ordered tiers of one decider, and the threads that serve them."""

    def __init__(
        self,
        decider: Decider,
        tiers: Sequence[Tier],
        *,
        fetches: int = 16,
        queue: int = 256,
        fetch_timeout_s: float = 5.0,
    ) -> None:
        """`queue` bounds the chunks waiting to be written to each; others are not written.

        So many `fetches` are read for at a time.
        """
        self._decider = decider
        self._tiers = list(tiers)
        self._timeout_s = fetch_timeout_s
        self._fetches: dict[str, Fetch] = {}
        self._reads = TierReads(decider, self._tiers, fetches)
        self._writes = TierWrites(decider, self._tiers, queue)
        if self._tiers:
            atexit.register(self.close)

    def __len__(self) -> int:
        return len(self._tiers)

    def lookup(
        self, owner: str, chain: KeyChain, geometry: Geometry, stop: int, asking: Asking = PLAIN
    ) -> Hit | None:
        """Like `Decider.lookup`, over all tiers; None while a slower tier is being read.

        Each owner asks the slower tiers once, until `forget`.
        """
        fetch = self._fetches.get(owner)
        if fetch is not None:
            return self._collect(fetch, chain, geometry, asking.start, stop)
        hit = self._decider.lookup(owner, chain, geometry, stop, asking.start)
        if self._tiers and hit.receipt.reason in _LACKING:
            try:
                want = Want.beyond(hit, chain, geometry, asking.start, stop)
            except BaseException:
                self._decider.release(hit.lease)
                raise
            if hit.receipt.reason is not Reason.BEING_WRITTEN or self._is_worth(want, asking):
                if self._fetch(owner, hit, want, geometry, asking):
                    return None
                hit = self._window_of(_because(hit, Reason.TIER_FAILED), geometry, asking.start, 0)
        self._looked_up(hit, asking.start)
        return hit

    def wait(self, owner: str) -> None:
        """Block until the fetch of `owner`, if any, has ended or timed out."""
        fetch = self._fetches.get(owner)
        if fetch:
            fetch.done.wait(max(0.0, fetch.deadline - time.monotonic()))

    def forget(self, owner: str) -> None:
        """The owner is gone, or wants to ask again."""
        fetch = self._fetches.pop(owner, None)
        if fetch:
            fetch.abandon(self._decider)

    def flush(self) -> None:
        """Return when everything offered so far has been written or refused."""
        for tier in self._tiers:
            tier.writes.wait()

    def describe(self) -> list[dict[str, object]]:
        """Each tier, for people."""
        return [
            {"name": tier.name, "awake": tier.is_awake(), "failures_in_a_row": tier.failures}
            for tier in self._tiers
        ]

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Finish the writes under way and close the backends, but wait no longer than this.

        The process's exit does it too. A second time does nothing.
        """
        atexit.unregister(self.close)
        self._reads.pool.close()
        for owner, fetch in list(self._fetches.items()):
            self.forget(owner)
            fetch.done.set()
        with self._decider.lock:
            self._decider.listeners.leave()
        deadline = time.monotonic() + timeout_s
        pools = [self._reads.pool, *(pool for t in self._tiers for pool in (t.writes, t.reads))]
        for pool in pools:
            ended = pool.wait(max(0.0, deadline - time.monotonic()))
            pool.close()
            if ended:
                pool.join()
        with ExitStack() as stack:  # an error in one of them must not keep the others open
            tiers, self._tiers = self._tiers, []
            for tier in reversed(tiers):
                stack.callback(tier.backend.close)

    # ---- the waiter's side of a fetch

    def _fetch(self, owner: str, hit: Hit, want: Want, geometry: Geometry, asking: Asking) -> bool:
        """Begin to read what `hit` lacks; False if there is nobody to ask."""
        if not any(tier.is_awake() for tier in self._tiers):
            return False
        now = time.monotonic()
        for_room_s = ROOM_S if asking.start else self._timeout_s * 3 / 4
        fetch = self._fetches[owner] = Fetch(
            owner,
            want,
            geometry,
            now + self._timeout_s,
            priority=asking.priority,
            window=self._window(want, geometry) if asking.in_windows else None,
            is_promised=asking.start > 0,
            room_until=now + min(for_room_s, self._timeout_s),
            held=sum(slot.size for slot in hit.slots),
            reason=hit.receipt.reason,
        )
        if hit.lease:
            fetch.leases.append(hit.lease)
        if self._reads.begin(fetch):
            return True
        del self._fetches[owner]
        return False

    def _is_worth(self, want: Want, asking: Asking) -> bool:
        """Whether to wait for what is being written: by a fetch, or with a load under way."""
        return asking.start > 0 or self._reads.is_coming(want.keys[0])

    def _window(self, want: Want, geometry: Geometry) -> int | None:
        """What to bring at once of more than half the slab holds: one part while another leaves."""
        capacity = self._decider.capacity_bytes
        wanted = sum(geometry.slot_bytes(pages) for pages in want.pages)
        return capacity // 4 if wanted > capacity // 2 else None

    def _collect(
        self, fetch: Fetch, chain: KeyChain, geometry: Geometry, start: int, stop: int
    ) -> Hit | None:
        late = time.monotonic() >= fetch.deadline
        if not fetch.done.is_set() and not late:
            return None
        hit = self._decider.lookup(fetch.owner, chain, geometry, stop, start)
        reason = fetch.reason if fetch.done.is_set() else Reason.TIMED_OUT
        if reason is Reason.TIMED_OUT and not fetch.abandoned:
            self._blame(fetch)
        if hit.receipt.reason not in (Reason.NONE, Reason.TIMED_OUT):
            is_cut = fetch.window and reason is Reason.NO_ROOM
            hit = _because(hit, reason)
            hit = self._window_of(hit, geometry, start, fetch.reach if is_cut else 0)
        by_tier = fetch.take_brought(hit)
        fetch.abandon(self._decider)
        hit = replace(hit, receipt=replace(hit.receipt, by_tier=by_tier))
        self._looked_up(hit, start)
        return hit

    def _window_of(self, hit: Hit, geometry: Geometry, start: int, reach: int) -> Hit:
        """What a load takes of a hit that is not all of it, and how much more it may ask for.

        If there is more, up to `reach`, or was before, it stops where a chunk does: there is no
        going on from anywhere else.
        """
        whole = _whole_chunks(hit, geometry)
        more = max(0, reach - start - whole.tokens) if whole.tokens else 0
        if not start and not more:
            return hit
        if not whole.slots:
            self._decider.release(hit.lease)
            whole = replace(whole, lease=None)
        return replace(whole, more=more)

    def _looked_up(self, hit: Hit, start: int) -> None:
        """Count a lookup; what a window brings is of one that was counted before."""
        receipt, counters = hit.receipt, self._decider.counters
        if not start:
            counters.looked_up(receipt.asked, receipt.by_tier, receipt.reason)
            return
        for tier, tokens in receipt.by_tier.items():
            counters.add("hit_tokens", tokens, tier)

    def _blame(self, fetch: Fetch) -> None:
        """Nobody answered in time: those who are being asked, or who leave no thread to ask."""
        late = BackendError(f"no answer within {self._timeout_s} s")
        for tier in self._tiers:
            if tier.calls or not fetch.started:
                tier.failed(late)


def _whole_chunks(hit: Hit, geometry: Geometry) -> Hit:
    """`hit` without a last chunk of fewer pages; the lease stays."""
    if not hit.slots or geometry.pages_of(hit.slots[-1]) == geometry.pages_per_chunk:
        return hit
    receipt = hit.receipt
    tokens = receipt.tokens - geometry.tokens_in(hit.slots[-1:])
    size = receipt.bytes - geometry.bytes_in(hit.slots[-1:])
    receipt = replace(receipt, tokens=tokens, bytes=size, by_tier={"l1": tokens})
    return replace(hit, slots=hit.slots[:-1], receipt=receipt)


def _because(hit: Hit, reason: Reason) -> Hit:
    return replace(hit, receipt=replace(hit.receipt, reason=reason))
