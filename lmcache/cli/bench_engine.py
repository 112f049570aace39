"""An engine that does not compute: one mover, one scheduler, one request at a time."""

from __future__ import annotations

import os
import time
import uuid
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import lmcache
from lmcache.core.chain import KeyChain
from lmcache.core.engine import moves_for
from lmcache.core.environment import environment_text
from lmcache.core.errors import ServiceError
from lmcache.core.geometry import Geometry
from lmcache.core.handover import Door, Grant, Hello, address_of
from lmcache.core.keys import Identity, Namespace, root_key
from lmcache.core.lender import Lender
from lmcache.core.mover import Mover
from lmcache.core.receipts import Reason
from lmcache.core.service import wire
from lmcache.core.service.client import ServiceClient
from lmcache.core.slab import Slab

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.cli.bench_pages import BenchPages
    from lmcache.core.decider import Hit

DEADLINE_S = 10.0
FILLER = 9906


class Timed(NamedTuple):
    """What one operation brought, and how long it took."""

    seconds: float
    tokens: int
    reason: Reason
    """Why there were no more."""


class BenchEngine:
    """Attached to a server until it is closed."""

    def __init__(self, pages: BenchPages, rpc_url: str, mode: str, *, fresh: bool = True) -> None:
        """With `fresh`, nothing that was stored before is found. Raises `ServiceError`."""
        self.pages = pages
        self._mover: Mover | Lender | None = None
        engine = f"bench-{uuid.uuid4()}"
        hello = Hello(
            number=0,
            page_tokens=pages.block_size,
            page_bytes=pages.layout.stored_bytes,
            summary=pages.layout.summary,
            slice_index=0,
            pid=os.getpid(),
        )
        lend = partial(pages.lent.lend, pages.layout) if pages.lent else None
        self._door = Door(address_of(engine, 0), hello, self._attach, self._detach, lend)
        self._namespace = Namespace(
            model="bench", generation=engine if fresh else "", dtype="", layout=""
        )
        about = wire.Attach(
            release=lmcache.__version__,
            engine=engine,
            name=engine,
            movers=1,
            mode=mode,
            token=environment_text("LMCACHE_TOKEN"),
        )
        try:
            self.client = ServiceClient.open(rpc_url, about, DEADLINE_S, patience_s=DEADLINE_S)
        except BaseException:
            self._door.close()
            raise

    def chain(self, number: int, length: int) -> KeyChain:
        """A prompt that shares no chunk with those of other numbers."""
        geometry = self.client.geometry
        tokens = [number, *[FILLER] * (length - 1)]  # a list, as engines have it
        return KeyChain(
            root_key(self._namespace, Identity()),
            tokens,
            page_tokens=geometry.page_tokens,
            pages_per_chunk=geometry.pages_per_chunk,
        )

    def lookup(self, chain: KeyChain) -> Timed:
        """Look a prompt up and give the lease back."""
        started = time.perf_counter()
        hit = self._hit(chain)
        spent = time.perf_counter() - started
        self.client.release("bench", hit)
        return Timed(spent, hit.tokens, hit.receipt.reason)

    def store(self, chain: KeyChain, table: Sequence[int]) -> Timed:
        """Store a prompt whose pages are `table`; on return the server has taken note of it."""
        mover = self._ready()
        started = time.perf_counter()
        slots, reason = self.client.reserve(chain, 0, len(chain.tokens), tail=True)
        step = self.client.depart(slots, [])
        moves = moves_for(slots, self.client.geometry, table, 0, len(table))
        mover.store(moves, None, mover.mark())
        mover.publish(moves)
        mover.finish(step)
        stored = self.client.geometry.tokens_in(slots)
        timed = Timed(time.perf_counter() - started, stored, reason)
        while self.lookup(chain).reason is Reason.BEING_WRITTEN:
            if time.perf_counter() - started > DEADLINE_S:
                raise ServiceError(f"what was stored is not complete after {DEADLINE_S} s")
        return timed

    def retrieve(self, chain: KeyChain, table: Sequence[int]) -> tuple[Timed, Timed]:
        """Look a prompt up and load what there is into `table`: the lookup, and the load."""
        mover = self._ready()
        started = time.perf_counter()
        hit = self._hit(chain)
        looked_up = time.perf_counter()
        step = self.client.depart([], [hit])
        moves = moves_for(hit.slots, self.client.geometry, table, 0, len(table))
        _, failed = mover.load(moves, None, mover.mark())
        mover.finish(step)
        loaded = time.perf_counter()
        self.client.release("bench", None)
        lost = sum(len(move.pages) for move in failed) * self.client.geometry.page_tokens
        reason = Reason.LOAD_FAILED if failed else hit.receipt.reason
        return (
            Timed(looked_up - started, hit.tokens, hit.receipt.reason),
            Timed(loaded - looked_up, hit.tokens - lost, reason),
        )

    def close(self) -> None:
        """Detach, and let go of the pages."""
        self.client.close()
        self._door.close()
        if self._mover:
            self._mover.close()

    def _hit(self, chain: KeyChain) -> Hit:
        """What the server has of a prompt, slower tiers included; it has its own deadlines."""
        while (hit := self.client.lookup("bench", chain, len(chain.tokens))) is None:
            pass  # each call waits for a while
        return hit

    def _ready(self) -> Mover | Lender:
        if self._mover is None or not self.client.is_whole():
            raise ServiceError("the server has gone away")
        return self._mover

    def _attach(self, grant: Grant, fds: list[int]) -> None:
        if self.pages.lent:
            self._mover = Lender(
                self.pages.layout,
                fds,
                DEADLINE_S,
                memory=self.pages.lent,
                given_up=self._door.hang_up,
            )
            return
        geometry = Geometry(
            page_tokens=self.pages.block_size,
            pages_per_chunk=grant.pages_per_chunk,
            slices=grant.slices,
            layout=grant.layout,
        )
        slab = Slab(fds[0], grant.slab_bytes)
        self._mover = Mover(
            self.pages.layout,
            geometry,
            slab,
            number=grant.word,
            copier=self.pages.copier(slab),
        )

    def _detach(self) -> None:
        if self._mover:
            self._mover.retire()
