"""One request's reading of slower tiers: what it wants and how far it got."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lmcache.core.receipts import Reason

if TYPE_CHECKING:
    from lmcache.core.chain import KeyChain
    from lmcache.core.decider import Decider, Hit
    from lmcache.core.keys import ChunkKey
    from lmcache.core.leases import Lease


class Want(NamedTuple):
    """Objects that would make a hit longer, in order, each useless without the one before."""

    first_chunk: int
    keys: list[ChunkKey]
    pages: list[int]
    """Pages of each object."""
    shorter: list[tuple[ChunkKey, int]]
    """If the first of `keys` is nowhere: tails of its chunk, longest first, with their pages."""

    @classmethod
    def beyond(cls, hit: Hit, chain: KeyChain, stop: int) -> Want:
        """What a lookup that stopped at `hit` lacks for the first `stop` tokens."""
        first = sum(slot.pages == chain.pages_per_chunk for slot in hit.slots)
        keys, pages, chunk = [], [], first
        while (count := chain.pages_in(chunk, stop)) > 0:
            keys.append(chain.part(chunk, count))
            pages.append(count)
            chunk += 1
        have = hit.slots[-1].pages if len(hit.slots) > first else 0
        shorter = [(chain.tail(first, n), n) for n in range(pages[0] - 1, have, -1)]
        return cls(first, keys, pages, shorter)


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
    tier: str = ""
    tokens: int = 0
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
