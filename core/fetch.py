"""One request's reading of slower tiers: what it wants and how far it got."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lmcache.core.receipts import Reason

if TYPE_CHECKING:
    from lmcache.core.chain import KeyChain
    from lmcache.core.decider import Decider, Hit
    from lmcache.core.geometry import Geometry
    from lmcache.core.keys import ChunkKey
    from lmcache.core.leases import Lease


class Asking(NamedTuple):
    """How an owner looks something up."""

    start: int = 0
    """From which token on, the first of a chunk; what comes before is loaded already."""
    in_windows: bool = False
    """Whether it loads what there is, and asks again for more while that is copied."""
    priority: int = 0
    """Among those who wait for slower tiers; lower is more urgent."""


PLAIN = Asking()


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
    def beyond(cls, hit: Hit, chain: KeyChain, geometry: Geometry, start: int, stop: int) -> Want:
        """What a lookup of tokens `start` .. `stop` that stopped at `hit` lacks."""
        held = [geometry.pages_of(slot) for slot in hit.slots]
        whole = held.count(chain.pages_per_chunk)
        first = start // chain.chunk_tokens + whole
        keys, pages, chunk = [], [], first
        while (count := chain.pages_in(chunk, stop)) > 0:
            keys.append(chain.part(chunk, count))
            pages.append(count)
            chunk += 1
        return cls(chain, first, held[-1] if len(held) > whole else 0, keys, pages)

    def key(self, step: int, pages: int) -> ChunkKey:
        """The key of the first `pages` pages of object number `step`. Safe on any thread."""
        return self.chain.part(self.first_chunk + step, pages)

    def end(self, steps: int) -> int:
        """The token that the first so many objects end before."""
        chunk = self.first_chunk + steps - 1
        return chunk * self.chain.chunk_tokens + self.pages[steps - 1] * self.chain.page_tokens

    def shorter(self, step: int) -> range:
        """How many pages of object number `step` would do if it is nowhere, longest first."""
        return range(self.pages[step] - 1, self.held if step == 0 else 0, -1)


@dataclass(eq=False)
class Fetch:
    """State shared by the thread that fetches and the one that waits. Guarded by `lock`."""

    owner: str
    want: Want
    geometry: Geometry
    deadline: float
    priority: int = 0
    """Lower is more urgent."""
    window: int | None = None
    """Bytes that may be brought, where the owner takes what there is and asks again for more."""
    is_promised: bool = False
    """Whether the engine counts on at least some of it."""
    room_until: float = 0.0
    """When to stop waiting for others to give up room."""
    held: int = 0
    """Bytes of what was found in the slab and fetched."""
    fetched: int = 0
    """Bytes of the latter."""
    reach: int = 0
    """Up to which token the tier that was being read has all."""
    leases: list[Lease] = field(default_factory=list)
    """Keep what was found in the slab, and what was fetched since, until the next lookup."""
    done: threading.Event = field(default_factory=threading.Event)
    started: bool = False
    brought: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Tier and tokens of each chunk brought so far, by the chunk's number."""
    reason: Reason = Reason.NEVER_STORED
    abandoned: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def has_window_for(self, size: int) -> bool:
        """Whether so many bytes more may be brought, or as the first."""
        return self.window is None or not self.fetched or self.fetched + size <= self.window

    def may_wait(self, size: int, capacity: int) -> bool:
        """Whether so many bytes more may get room by waiting: not if we ourselves hold it all."""
        windowed = self.window is not None or self.is_promised
        is_stuck = self.held > 0 if windowed else self.held + size > capacity
        return not is_stuck and time.monotonic() < self.room_until

    def may_wait_for_writer(self) -> bool:
        """Whether to wait until an engine has stored what is wanted: computing it is as good."""
        return self.is_promised and not self.held and time.monotonic() < self.room_until

    def take_brought(self, hit: Hit) -> dict[str, int]:
        """Of the tokens of `hit`, how many come from which tier; what was fetched counts once."""
        by_tier = Counter({"l1": hit.tokens})
        for slot in hit.slots:
            tier, tokens = self.brought.pop(slot.chunk, ("l1", 0))
            by_tier["l1"] -= tokens
            by_tier[tier] += tokens
        return dict(by_tier)

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
