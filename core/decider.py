"""Holds the index, the leases and the slots, and decides every hit. Copies nothing.

A slot's life: reserved (its bytes are being written, nobody sees it), complete (in the index,
evictable unless leased), gone. One lock guards all of it; nothing slow happens under the lock.
"""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcache.core.index import ABSENT, ALL, Slot
from lmcache.core.leases import Lease, Leases
from lmcache.core.metrics import Counters
from lmcache.core.objects import Description, start_header
from lmcache.core.receipts import Reason, Receipt
from lmcache.core.shelf import Listeners, Shelf

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.core.chain import KeyChain
    from lmcache.core.eviction import EvictionPolicy
    from lmcache.core.geometry import Geometry
    from lmcache.core.keys import ChunkKey
    from lmcache.core.slab import Slab


@dataclass(frozen=True)
class Hit:
    """The longest prefix that can be restored now."""

    slots: list[Slot]
    lease: Lease | None
    """Keeps `slots` in place; None if there are none."""
    receipt: Receipt
    more: int = 0
    """Tokens beyond these that a slower tier has and the slab has no room for."""

    @property
    def tokens(self) -> int:
        """How many can be restored, from where the lookup began."""
        return self.receipt.tokens


class Decider:
    """Decides what is where in one slab, for any number of engines."""

    def __init__(
        self,
        slab: Slab,
        policy: EvictionPolicy,
        *,
        counters: Counters | None = None,
        keep: bool = True,
        lease_s: float = 300.0,
        patience_s: float = -1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """With `keep` False a chunk leaves the slab as soon as nobody holds a lease on it.

        A lookup that has waited `patience_s` for the lock is a miss; below 0 it waits on.
        """
        self.lock = threading.RLock()
        self.slab = slab
        self.counters = counters or Counters()
        self.leases = Leases()
        self._shelf = Shelf(slab.size, policy, self.counters, keep=keep)
        self._index = self._shelf.index
        self._lease_s = lease_s
        self._patience_s = patience_s
        self._clock = clock
        self._reserved: dict[ChunkKey, Slot] = {}
        self._generation = secrets.randbits(62)

    @property
    def capacity_bytes(self) -> int:
        """Bytes available to slots."""
        return self._shelf.capacity_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes no slot occupies."""
        return self._shelf.free_bytes

    @property
    def keep(self) -> bool:
        """Whether chunks stay when nobody holds a lease on them."""
        return self._shelf.keep

    @property
    def listeners(self) -> Listeners:
        """Who is told of chunks."""
        return self._shelf.listeners

    def gauges(self) -> dict[str, float]:
        """Levels worth watching."""
        with self.lock:
            return {
                "capacity_bytes": self.capacity_bytes,
                "free_bytes": self.free_bytes,
                "chunks": len(self._index),
                "leases": len(self.leases),
            }

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._index

    def find(self, key: ChunkKey) -> int:
        """The entry of a complete chunk, or `ABSENT`; valid while leased or under the lock."""
        return self._index.find(key)

    @property
    def policy_name(self) -> str:
        """What the eviction policy calls itself."""
        return type(self._shelf.policy).__name__.removesuffix("Policy")

    # ---- reading

    def peek(self, chain: KeyChain, stop: int) -> tuple[list[Slot], Reason]:
        """The slot of each chunk that a lookup would find, and why it would stop there.

        Nothing is leased, and no eviction is put off.
        """
        self._index.leading(chain.full(stop))
        with self.lock:
            entries, reason = self._walk(chain, stop)
            return self._index.leading_slots(entries), reason

    def has_all(self, chain: KeyChain, stop: int) -> bool:
        """Whether every full chunk before `stop` is stored. A hint: nothing is leased."""
        entries = self._index.leading(chain.full(stop))
        return len(entries) == stop // chain.chunk_tokens

    def lookup(
        self, owner: str, chain: KeyChain, geometry: Geometry, stop: int, start: int = 0
    ) -> Hit:
        """Lease the longest stored stretch of tokens `start` .. `stop`, in whole pages.

        It begins at `start`, the first token of a chunk.
        """
        started = time.perf_counter()
        if not chain.has_keys(stop):  # they are computed before the lock is taken
            self._index.leading(chain.full(stop))
        if not self.lock.acquire(timeout=self._patience_s):
            return Hit([], None, Receipt(0, stop - start, Reason.TIMED_OUT))
        try:
            self._expire()
            first = start // chain.chunk_tokens
            entries, reason = self._walk(chain, stop, first)
            slots = self._index.leading_slots(entries, first)
            lease = self.lease(owner, entries) if entries else None
        finally:
            self.lock.release()
        tokens, size = geometry.tokens_in(slots), geometry.bytes_in(slots)
        spent = (time.perf_counter() - started) * 1e3
        asked = stop - start
        return Hit(slots, lease, Receipt(tokens, asked, reason, {"l1": tokens}, size, spent))

    def _walk(self, chain: KeyChain, stop: int, first: int = 0) -> tuple[list[int], Reason]:
        """The entries stored from chunk `first` on without a gap, and why there are no more.

        Of a sequence that is not known as far as `stop` no more is looked for than is known.
        """
        stop = min(stop, len(chain.tokens))
        entries = self._index.leading(chain.full(stop, first))
        chunk = first + len(entries)
        pages = chain.pages_in(chunk, stop)
        if not pages:
            return entries, Reason.NONE if chunk else Reason.SHORT
        entry = self._index.find(chain.part(chunk, pages))
        reason = Reason.NONE
        if entry == ABSENT:
            entry, reason = self._shorter(chain, chunk, pages)
        return (entries if entry == ABSENT else [*entries, entry]), reason

    def _shorter(self, chain: KeyChain, chunk: int, pages: int) -> tuple[int, Reason]:
        """The longest stored tail of a chunk that is not stored whole, and why it is not."""
        reason = self.why_absent(chain.part(chunk, pages))
        for fewer in range(pages - 1, 0, -1):
            entry = self._index.find(chain.tail(chunk, fewer))
            if entry != ABSENT:
                return entry, reason
        return ABSENT, reason

    def why_absent(self, key: ChunkKey) -> Reason:
        """Why `key` is not in the slab."""
        if key in self._reserved:
            return Reason.BEING_WRITTEN
        return Reason.EVICTED if key in self._shelf.evicted else Reason.NEVER_STORED

    def lease(self, owner: str, entries: list[int], *, is_use: bool = True) -> Lease:
        """Keep complete entries in place. The last ones become the first to be evicted later.

        It is no use of them if a lookup will lease them again, as that will be one.
        """
        pins = self._index.pins
        for entry in entries:
            pins[entry] += 1
        if is_use:
            self._shelf.used(reversed(entries))
        lease = Lease(owner, list(entries), self._clock() + self._lease_s)
        self.leases.add(lease)
        return lease

    def release(self, lease: Lease | None) -> None:
        """End a lease. Ending it twice, or after its deadline, does nothing."""
        with self.lock:
            if lease is None or not self.leases.take(lease):
                return
            for entry in lease.entries:
                self._shelf.unpin(entry)
            self._shelf.informed()

    # ---- writing

    def reserve(
        self, chain: KeyChain, geometry: Geometry, start: int, stop: int, *, tail: bool
    ) -> tuple[list[Slot], Reason]:
        """Slots for the chunks of tokens `start` .. `stop` that are neither stored nor coming.

        `start` is rounded down to a chunk. With `tail`, a last chunk of fewer pages counts too.
        The caller must `commit` or `abandon` each slot.
        """
        wanted = []
        for chunk in range(start // geometry.chunk_tokens, -(-stop // geometry.chunk_tokens)):
            pages = chain.pages_in(chunk, stop)
            if pages == 0 or (pages < geometry.pages_per_chunk and not tail):
                break
            # a key that cannot be computed must raise before any slot is taken
            wanted.append((chunk, pages, chain.part(chunk, pages)))
        with self.lock:
            self._expire()
            slots, reason = self._reserve(wanted, geometry, chain.root)
            self._shelf.informed()
        return slots, reason

    def _reserve(
        self, wanted: list[tuple[int, int, ChunkKey]], geometry: Geometry, root: ChunkKey
    ) -> tuple[list[Slot], Reason]:
        slots: list[Slot] = []
        for chunk, pages, key in wanted:
            if key in self._reserved:
                continue
            if (entry := self._index.find(key)) != ABSENT:
                self._shelf.used([entry])
                continue
            slot = self.place(key, geometry, pages, chunk, root)
            if slot is None:
                return slots, Reason.NO_ROOM
            slots.append(slot)
        return slots, Reason.NONE

    def place(
        self, key: ChunkKey, geometry: Geometry, pages: int, chunk: int, root: ChunkKey
    ) -> Slot | None:
        """Reserve one slot, evicting what must go; None if all the rest is leased or reserved."""
        size = geometry.slot_bytes(pages)
        offset = self._shelf.place(size)
        if offset is None:
            return None
        self._generation += 1
        slot = Slot(key, offset, size, self._generation, chunk)
        self._reserved[key] = slot
        start_header(self.slab.view[offset:], Description.of(slot, geometry, root))
        return slot

    def commit(self, slot: Slot, geometry: Geometry, *, lacking: int = ALL) -> int:
        """A reserved slot is complete: everybody may see it. Returns its entry.

        Of the slower tiers the first `lacking` may be given it: all of them, if it is an engine's.
        If nobody wants such a slot and it is not to be kept, it is gone on return.
        """
        with self.lock:
            del self._reserved[slot.key]
            entry = self._shelf.add(slot, lacking=lacking)
            self._shelf.pin(entry)
            try:
                if lacking and self.listeners.on_commit:
                    self.listeners.on_commit(slot)
            finally:
                if lacking == ALL:
                    self._shelf.unpin(entry)
                else:  # who has read it is about to lease it
                    self._index.pins[entry] -= 1
            return entry

    def lacking(self, key: ChunkKey) -> int:
        """How many slower tiers, from the first on, may be given a complete chunk."""
        return self._index.lacking[self._index.find(key)]

    def abandon(self, slot: Slot) -> None:
        """A reserved slot will never be complete, and nobody writes to it any more."""
        with self.lock:
            del self._reserved[slot.key]
            self._shelf.free(slot)

    def discard(self, key: ChunkKey, generation: int) -> None:
        """Drop a complete chunk that turned out to be bad, unless it is leased or replaced."""
        with self.lock:
            entry = self._index.find(key)
            if entry == ABSENT or self._index.generation[entry] != generation:
                return
            self._shelf.drop_idle(entry)

    def clear(self) -> int:
        """Drop every chunk that is not leased; returns how many."""
        with self.lock:
            return self._shelf.clear()

    # ---- below the lock

    def pin(self, key: ChunkKey) -> int:
        """Keep one complete entry in place until `unpin`."""
        entry = self._index.find(key)
        self._shelf.pin(entry)
        return entry

    def unpin(self, entry: int) -> None:
        """Undo one `pin`."""
        with self.lock:
            self._shelf.unpin(entry)

    def _expire(self) -> None:
        for lease in self.leases.expired(self._clock()):
            self.counters.add("expired_leases")
            self.release(lease)
