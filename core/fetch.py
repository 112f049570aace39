"""One request's reading of slower tiers: what it wants and how far it got."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmcache.core.receipts import Reason

if TYPE_CHECKING:
    from lmcache.core.chain import KeyChain
    from lmcache.core.decider import Decider, Hit
    from lmcache.core.keys import ChunkKey
    from lmcache.core.leases import Lease


@dataclass(frozen=True)
class Want:
    """Objects that would make a hit longer, in order, each useless without the one before."""

    chain: KeyChain
    first_chunk: int
    held: int
    """Pages of the first chunk that the hit has already."""
    keys: list[ChunkKey]
    pages: list[int]
    """Pages of each object."""

    @classmethod
    def beyond(cls, hit: Hit, chain: KeyChain, stop: int) -> Want:
        """What a lookup that stopped at `hit` lacks for the first `stop` tokens."""
        first = sum(slot.pages == chain.pages_per_chunk for slot in hit.slots)
        keys, pages, chunk = [], [], first
        while (count := chain.pages_in(chunk, stop)) > 0:
            keys.append(chain.part(chunk, count))
            pages.append(count)
            chunk += 1
        held = hit.slots[-1].pages if len(hit.slots) > first else 0
        return cls(chain, first, held, keys, pages)

    def key(self, step: int, pages: int) -> ChunkKey:
        """The key of the first `pages` pages of object number `step`. Safe on any thread."""
        return self.chain.part(self.first_chunk + step, pages)

    def shorter(self, step: int) -> range:
        """How many pages of object number `step` would do if it is nowhere, longest first."""
        return range(self.pages[step] - 1, self.held if step == 0 else 0, -1)


@dataclass(eq=False)
class Fetch:
    """State shared by the thread that fetches and the one that waits. Guarded by `lock`."""

    owner: str
    want: Want
    deadline: float
    leases: list[Lease] = field(default_factory=list)
    """Keep what was found in the slab, and what was fetched since, until the next lookup."""
    done: threading.Event = field(default_factory=threading.Event)
    started: bool = False
    tokens: Counter[str] = field(default_factory=Counter)
    """Brought so far, by the name of their tier."""
    reason: Reason = Reason.NEVER_STORED
    abandoned: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def keep(self, lease: Lease, decider: Decider) -> None:
        """Hold a lease for the waiter, unless there is none any more."""
        with self.lock:
            if not self.abandoned:
                self.leases.append(lease)
                return
        decider.release(lease)

    def abandon(self, decider: Decider) -> None:
        """The waiter is gone or has what it wanted: hold nothing for it."""
        with self.lock:
            self.abandoned = True
            leases, self.leases = self.leases, []
        for lease in leases:
            decider.release(lease)
