"""Slower tiers behind the slab: written to as chunks become complete, read when the slab misses.

Nothing here runs on the caller's thread except a look at what a worker thread has done. This is
the one place where `BackendError` becomes a miss and a counter.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from lmcache.core.errors import BackendError
from lmcache.core.fetch import Fetch, Want
from lmcache.core.log import init_logger
from lmcache.core.objects import Description, is_intact, seal
from lmcache.core.receipts import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmcache.core.backend import StorageBackend
    from lmcache.core.chain import KeyChain
    from lmcache.core.decider import Decider, Hit
    from lmcache.core.geometry import Geometry
    from lmcache.core.index import Slot
    from lmcache.core.keys import ChunkKey

logger = init_logger(__name__)

Answer = TypeVar("Answer")

TRIES = 3
REST_S = 10.0
"""After `TRIES` failures in a row a backend is left alone for this long."""
CLOSE_S = 10.0
"""How long `close` waits for a backend."""


@dataclass
class Tier:
    """One backend, and whether it deserves to be asked."""

    name: str
    backend: StorageBackend
    failures: int = 0
    asleep_until: float = 0.0
    calls: int = 0
    """Under way now."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def is_awake(self) -> bool:
        """Whether the backend may be asked now."""
        return time.monotonic() >= self.asleep_until

    def failed(self, error: BackendError) -> None:
        """Take note of a failure; after several in a row, rest."""
        self.failures += 1
        if self.failures >= TRIES and self.is_awake():
            self.asleep_until = time.monotonic() + REST_S
            logger.warning("tier %s rests for %.0f s: %s", self.name, REST_S, error)

    def worked(self) -> None:
        """Take note that it answered."""
        self.failures = 0

    def call(self, what: Callable[[StorageBackend], Answer]) -> Answer:
        """Call the backend. Whatever it raises is a `BackendError`, even if it should not be."""
        with self.lock:
            self.calls += 1
        try:
            return what(self.backend)
        except BackendError:
            raise
        except Exception as error:
            raise BackendError(f"{type(self.backend).__name__} raised {error!r}") from error
        finally:
            with self.lock:
                self.calls -= 1


class Tiers:
    """The ordered tiers of one decider, and the threads that serve them."""

    def __init__(
        self,
        decider: Decider,
        tiers: Sequence[Tier],
        *,
        threads: int = 4,
        queue: int = 256,
        fetch_timeout_s: float = 5.0,
    ) -> None:
        """`queue` bounds the chunks waiting to be written; what does not fit is not written.

        As many `threads` read as write, so that no reader waits behind that queue.
        """
        self._decider = decider
        self._tiers = list(tiers)
        self._queue = queue
        self._writes: set[Future[None]] = set()
        self._reads: set[Future[None]] = set()
        self._timeout_s = fetch_timeout_s
        self._fetches: dict[str, Fetch] = {}
        self._readers = ThreadPoolExecutor(threads, "lmcache-tier-read")
        self._writers = ThreadPoolExecutor(threads, "lmcache-tier-write")
        if self._tiers:
            decider.on_commit = self._offer

    def lookup(self, owner: str, chain: KeyChain, geometry: Geometry, stop: int) -> Hit | None:
        """Like `Decider.lookup`, over all tiers; None while a slower tier is being read.

        Each owner asks the slower tiers once, until `forget`.
        """
        fetch = self._fetches.get(owner)
        if fetch is not None:
            return self._collect(fetch, owner, chain, geometry, stop)
        hit = self._decider.lookup(owner, chain, geometry, stop)
        try:
            if self._fetch(owner, hit, chain, geometry, stop):
                return None
        except BaseException:
            self._decider.release(hit.lease)
            raise
        self._decider.counters.looked_up(stop, hit.receipt.by_tier, hit.receipt.reason)
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
        with self._decider.lock:
            writes = set(self._writes)
        wait_for(writes)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Finish the writes under way and close the backends, but wait no longer than this."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        for owner, fetch in list(self._fetches.items()):
            self.forget(owner)
            fetch.done.set()
        with self._decider.lock:
            self._decider.on_commit = None
            jobs = self._writes | self._reads
        stuck = wait_for(jobs, timeout_s).not_done
        for pool in (self._readers, self._writers):
            pool.shutdown(wait=not stuck, cancel_futures=True)
        with ExitStack() as stack:  # an error in one of them must not keep the others open
            for tier in reversed(self._tiers):
                stack.callback(tier.backend.close)

    # ---- the waiter's side of a fetch

    def _fetch(self, owner: str, hit: Hit, chain: KeyChain, geometry: Geometry, stop: int) -> bool:
        """Begin to read what `hit` lacks; False if there is nothing to read or nobody to ask."""
        if hit.receipt.reason not in (Reason.NEVER_STORED, Reason.EVICTED):
            return False
        if not any(tier.is_awake() for tier in self._tiers):
            return False
        want = Want.beyond(hit, chain, stop)
        deadline = time.monotonic() + self._timeout_s
        fetch = Fetch(owner, want, deadline, reason=hit.receipt.reason)
        if hit.lease:
            fetch.leases.append(hit.lease)
        try:
            read = self._readers.submit(self._run, fetch, geometry)
        except RuntimeError:  # closed meanwhile
            return False
        self._reads.add(read)
        read.add_done_callback(self._over)
        self._fetches[owner] = fetch
        return True

    def _collect(
        self, fetch: Fetch, owner: str, chain: KeyChain, geometry: Geometry, stop: int
    ) -> Hit | None:
        late = time.monotonic() >= fetch.deadline
        if not fetch.done.is_set() and not late:
            return None
        hit = self._decider.lookup(owner, chain, geometry, stop)
        reason = fetch.reason if fetch.done.is_set() else Reason.TIMED_OUT
        if reason is Reason.TIMED_OUT and not fetch.abandoned:
            self._blame(fetch)
        fetched, fetch.tokens = min(fetch.tokens, hit.tokens), 0  # counted once
        fetch.abandon(self._decider)
        by_tier = {"l1": hit.tokens - fetched}
        if fetched:
            by_tier[fetch.tier] = fetched
        if hit.receipt.reason not in (Reason.NONE, Reason.TIMED_OUT):
            hit = replace(hit, receipt=replace(hit.receipt, reason=reason))
        self._decider.counters.looked_up(stop, by_tier, hit.receipt.reason)
        return replace(hit, receipt=replace(hit.receipt, by_tier=by_tier))

    def _blame(self, fetch: Fetch) -> None:
        """Nobody answered in time: those who are being asked, or who leave no thread to ask."""
        late = BackendError(f"no answer within {self._timeout_s} s")
        for tier in self._tiers:
            if tier.calls or not fetch.started:
                tier.failed(late)

    # ---- on the tier threads

    def _run(self, fetch: Fetch, geometry: Geometry) -> None:
        fetch.started = True
        try:
            tier, keys, pages = self._best(fetch.want)
            if tier:
                fetch.tier = tier.name
                for step, (key, count) in enumerate(zip(keys, pages, strict=True)):
                    reason = self._bring(tier, fetch, geometry, key, pages=count, step=step)
                    if reason is not Reason.NONE:
                        fetch.reason = reason
                        return
        finally:
            fetch.done.set()

    def _best(self, want: Want) -> tuple[Tier | None, Sequence[ChunkKey], Sequence[int]]:
        """The tier that has most of what is wanted, and what it has."""
        best: Tier | None = None
        most = 0
        for tier in self._tiers:
            count = self._ask(tier, lambda b: b.count_leading(want.keys)) or 0
            if count > most:
                best, most = tier, count
            if most == len(want.keys):
                break
        if best:
            return best, want.keys[:most], want.pages[:most]
        for tier in self._tiers:
            for key, pages in want.shorter:
                if self._ask(tier, partial(_contains, key=key)):
                    return tier, [key], [pages]
        return None, [], []

    def _bring(
        self, tier: Tier, fetch: Fetch, geometry: Geometry, key: ChunkKey, *, pages: int, step: int
    ) -> Reason:
        """Read one object into a slot of its own."""
        decider = self._decider
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
        fetch.tokens += pages * geometry.page_tokens
        return Reason.NONE

    def _read(self, tier: Tier, slot: Slot, geometry: Geometry) -> Reason:
        """Read an object straight into its slot and check every byte of it."""
        view = self._decider.slab.view[slot.offset : slot.offset + slot.size]
        size = self._ask(tier, lambda backend: backend.get_into(slot.key, view))
        if size is None:
            return Reason.NEVER_STORED
        if size != slot.size or not is_intact(view, _about(slot, geometry)):
            self._decider.counters.add("damaged", label=tier.name)
            if tier.backend.capabilities.removal:
                self._ask(tier, lambda backend: backend.remove(slot.key))
            return Reason.DAMAGED
        for index in range(len(geometry.slices)):
            self._decider.slab.write_word(slot.offset + geometry.tag_offset(index), slot.generation)
        return Reason.NONE

    def _offer(self, slot: Slot, geometry: Geometry) -> None:
        """Queue a complete slot for writing. Called under the decider's lock."""
        if len(self._writes) >= self._queue:
            self._decider.counters.add("tier_dropped")
            return
        entry = self._decider.pin(slot.key)
        try:
            write = self._writers.submit(self._write, entry, slot, geometry)
        except RuntimeError:  # closed meanwhile
            self._decider.counters.add("tier_dropped")
            self._decider.unpin(entry)
            return
        self._writes.add(write)
        write.add_done_callback(partial(self._written, entry))

    def _written(self, entry: int, write: Future[None]) -> None:
        if write.cancelled():
            self._decider.unpin(entry)
        self._over(write)

    def _over(self, job: Future[None]) -> None:
        with self._decider.lock:
            self._writes.discard(job)
            self._reads.discard(job)
        if not job.cancelled():
            job.result()

    def _write(self, entry: int, slot: Slot, geometry: Geometry) -> None:
        view = self._decider.slab.view[slot.offset : slot.offset + slot.size]
        try:
            seal(view, _about(slot, geometry))
            for tier in self._tiers:
                kept = self._ask(tier, lambda backend: backend.put(slot.key, view))
                self._decider.counters.add("tier_written" if kept else "tier_dropped", 1, tier.name)
        finally:
            self._decider.unpin(entry)

    def _ask(self, tier: Tier, call: Callable[[StorageBackend], Answer]) -> Answer | None:
        if not tier.is_awake():
            return None
        try:
            answer = tier.call(call)
        except BackendError as error:
            self._decider.counters.add("tier_errors", label=tier.name)
            tier.failed(error)
            return None
        tier.worked()
        return answer


def _contains(backend: StorageBackend, key: ChunkKey) -> bool:
    return backend.contains(key)


def _about(slot: Slot, geometry: Geometry) -> Description:
    return Description(slot.key, geometry.layout, slot.pages, slot.pages * geometry.page_bytes)
