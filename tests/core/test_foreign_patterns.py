"""A pool far too small, many tenants, random aborts: nobody ever gets another's bytes."""

from __future__ import annotations

import queue
import random
import threading
import time
from dataclasses import dataclass, field

import pytest
import rig

from lmcache.backends.memory import MemoryBackend
from lmcache.core import tier as tier_module
from lmcache.core.engine import moves_for
from lmcache.core.eviction.arc import ARCPolicy
from lmcache.core.eviction.lru import LRUPolicy
from lmcache.core.eviction.s3fifo import S3FIFOPolicy
from lmcache.core.flights import Flights
from lmcache.core.mover import Move
from lmcache.core.objects import HEADER_BYTES
from lmcache.core.slab import MOVER_BYTES
from lmcache.testing.faults import Corrupting, Flaky, Wrapper

PAGE, CHUNK = rig.PAGE_TOKENS, rig.CHUNK_TOKENS
RANKS = 2
SLOTS = 7
REQUESTS = 4000
TENANTS = ("", "a", "b")
PROMPTS = 6


@dataclass
class Work:
    """One request's share of a step."""

    sequence: list[int]
    salt: str
    table: list[int]
    loads: list[Move] = field(default_factory=list)
    loaded_chunks: list[int] = field(default_factory=list)
    stores: list[Move] = field(default_factory=list)


class Rank(threading.Thread):
    """A worker: loads, checks every byte it loaded, computes the rest, stores, answers."""

    def __init__(self, number, mover, pages):
        super().__init__(name=f"rank-{number}")
        self.mover, self.pages = mover, pages
        self.steps = queue.Queue()
        self.foreign = []
        self.loaded = self.failed = 0
        self.error = None
        self.rng = random.Random(number)

    def run(self):
        try:
            while (step := self.steps.get()) is not None:
                number, works = step
                for work in works:
                    self.forward(work)
                if self.rng.random() < 0.3:
                    time.sleep(self.rng.random() * 1e-3)
                self.mover.finish(number)
        except BaseException as error:
            self.error = error

    def forward(self, work):
        _, failed = self.mover.load(work.loads)
        hold = set()
        for move, chunk in zip(work.loads, work.loaded_chunks, strict=True):
            if move in failed:
                self.failed += 1
                continue
            self.loaded += 1
            first = chunk * rig.PAGES_PER_CHUNK + move.first
            wrong = self.pages.wrong(
                work.sequence,
                work.table,
                (first + len(move.pages)) * PAGE,
                salt=work.salt,
                first=first,
            )
            self.foreign += [(work.salt, chunk, page) for page in wrong]
            hold |= set(move.pages)
        for index in range(len(work.sequence) // PAGE):
            if work.table[index] not in hold:
                data = rig.content(
                    work.sequence, index, salt=work.salt, slice_index=self.pages.slice_index
                )
                self.pages.write(work.table[index], data)
        if self.rng.random() < 0.03:
            return  # the copy failed, on this rank alone
        self.mover.store(work.stores)
        self.mover.publish(work.stores)


class Hammer:
    """The scheduling side, which aborts whatever can be aborted, whenever it can."""

    def __init__(self, workshop, backend, *, keep, policy, seed):
        self.rng = random.Random(seed)
        self.decider = workshop.decider(SLOTS, keep=keep, policy=policy(), lease_s=0.005)
        self.tiers = workshop.tiers(self.decider, backend, fetch_timeout_s=0.02, queue=4)
        self.geometry = rig.geometry(RANKS)
        self.flights = Flights(self.decider, self.geometry, range(RANKS))
        self.ranks = []
        for number in range(RANKS):
            pages = rig.Pages(64, slice_index=number)
            mover = workshop.mover(
                pages, self.geometry, self.decider.slab, number=number, slice_index=number
            )
            self.ranks.append(Rank(number, mover, pages))
        self.free_pages = list(range(64))
        self.in_use = []
        self.waiting = {}
        self.known = {}
        self.owners = 0
        self.aborts = self.served = 0

    def answered(self):
        return min(self.decider.slab.read_word(rank * MOVER_BYTES) for rank in range(RANKS))

    def arrive(self):
        """A new request: part of one of a few prompts, for one of a few tenants."""
        salt = self.rng.choice(TENANTS)
        length = self.rng.randint(1, 4 * CHUNK)
        sequence = rig.tokens(length, self.rng.randrange(PROMPTS))
        if length > CHUNK and self.rng.random() < 0.3:  # it goes its own way from here on
            cut = self.rng.randrange(length)
            sequence[cut:] = rig.tokens(length - cut, 100 + self.rng.randrange(3))
        self.owners += 1
        chain = rig.chain(sequence, salt=salt)
        for chunk in range(4):
            for pages in range(1, chain.pages_in(chunk, length) + 1):
                self.known[chain.part(chunk, pages)] = (sequence, salt, chunk, pages)
        self.waiting[f"r{self.owners}"] = (sequence, salt, chain, None)

    def step(self):
        self.flights.settle()
        done = self.answered()
        while self.in_use and self.in_use[0][0] <= done:
            self.free_pages += self.in_use.pop(0)[1]
        while len(self.waiting) < 6:
            self.arrive()
        works, stores, leases, loaded, tables = [], [], [], [], []
        for owner in self.rng.sample(sorted(self.waiting), 3):
            sequence, salt, chain, hit = self.waiting[owner]
            hit = hit or self.tiers.lookup(owner, chain, self.geometry, len(sequence))
            self.waiting[owner] = (sequence, salt, chain, hit)
            if self.rng.random() < 0.15:
                self.abort(owner)
                continue
            if hit is None or len(self.free_pages) < len(sequence) // PAGE:
                continue  # its tier is being read, or it waits for pages: its lease may run out
            del self.waiting[owner]
            self.tiers.forget(owner)
            table = [self.free_pages.pop() for _ in range(len(sequence) // PAGE)]
            tables += table
            work = Work(sequence, salt, table)
            if hit.lease:
                leases.append(hit.lease)
                loaded += hit.slots
                work.loads = moves_for(hit.slots, self.geometry, table, 0, len(table))
                work.loaded_chunks = [slot.chunk for slot in hit.slots]
            slots, _ = self.decider.reserve(
                chain, self.geometry, 0, len(sequence), tail=self.rng.random() < 0.7
            )
            work.stores = moves_for(slots, self.geometry, table, 0, len(table))
            stores += slots
            works.append(work)
            self.served += 1
        self.send(works, stores, leases, loaded, tables)

    def send(self, works, stores, leases, loaded, tables):
        if not works:
            return
        if self.rng.random() < 0.03:  # the engine fails to build the step
            self.aborts += 1
            for lease in leases:
                self.decider.release(lease)
            for slot in stores:
                self.decider.abandon(slot)
            self.free_pages += tables
            return
        number = self.flights.depart(stores, leases, loaded)
        self.in_use.append((number, tables))
        if self.rng.random() < 0.03:  # the step is never sent
            self.aborts += 1
            return
        for rank in self.ranks:
            rank.steps.put((number, works))

    def abort(self, owner):
        """The client is gone: before, during or after the reading of a slower tier."""
        self.aborts += 1
        *_, hit = self.waiting.pop(owner)
        self.tiers.forget(owner)
        if hit:
            self.decider.release(hit.lease)

    def run(self):
        for rank in self.ranks:
            rank.start()
        try:
            while self.served < REQUESTS:
                served = self.served
                self.step()
                if self.rng.random() < 0.01:
                    self.decider.clear()
                if self.served == served or len(self.flights) > 5:
                    time.sleep(2e-4)
                assert all(rank.is_alive() for rank in self.ranks), self.ranks[0].error
        finally:
            for rank in self.ranks:
                rank.steps.put(None)
            for rank in self.ranks:
                rank.join()

    def end(self):
        """All requests are over; the last step may be one that was never sent."""
        self.flights.settle()
        self.flights.ground()
        for owner in list(self.waiting):
            self.abort(owner)
        self.tiers.flush()
        tier = self.tiers._tiers[0]
        rig.wait_until(lambda: not self.tiers._reads.pool and not tier.writes)

    def payload(self, key):
        """What an object of this key must hold: slice by slice, region by region, page by page."""
        sequence, salt, chunk, pages = self.known[key]
        first = chunk * rig.PAGES_PER_CHUNK
        share = rig.PAGE_BYTES // rig.REGIONS
        parts = []
        for rank in range(RANKS):
            made = [
                rig.content(sequence, first + i, salt=salt, slice_index=rank) for i in range(pages)
            ]
            parts += [
                page[region * share : (region + 1) * share]
                for region in range(rig.REGIONS)
                for page in made
            ]
        return b"".join(parts)


class Kept(Wrapper):
    def close(self):
        pass


@pytest.mark.parametrize(
    ("keep", "policy"),
    [(True, LRUPolicy), (True, ARCPolicy), (False, S3FIFOPolicy)],
    ids=["kept-lru", "kept-arc", "not-kept-s3fifo"],
)
def test_no_foreign_byte_ever(workshop, monkeypatch, keep, policy):
    monkeypatch.setattr(tier_module, "REST_S", 0.01)
    memory = MemoryBackend(max_size=20 * rig.SLOT)
    backend = Flaky(Corrupting(Kept(memory), every=11), every=17)
    hammer = Hammer(workshop, backend, keep=keep, policy=policy, seed=4)
    hammer.run()
    assert [rank.error for rank in hammer.ranks] == [None] * RANKS
    assert [rank.foreign for rank in hammer.ranks] == [[]] * RANKS
    hammer.end()

    # what is left at rest is right as well
    objects = dict(memory._objects)
    assert objects
    for key, data in objects.items():
        assert data[HEADER_BYTES:] == hammer.payload(key)
    decider = hammer.decider
    for entry, key in enumerate(decider._index.keys):
        if key is not None:
            slot = decider._index.slot(entry, 0)
            view = decider.slab.view[slot.offset + HEADER_BYTES : slot.offset + slot.size]
            assert view == hammer.payload(key)
    rig.assert_idle(decider)

    # and all of it was put to the test
    counters = decider.counters
    assert sum(rank.loaded for rank in hammer.ranks) > 300
    assert hammer.aborts > 300
    for name in ("store_failures", "tier_errors", "damaged", "hit_tokens", "tier_dropped"):
        assert counters[name] > 0, name
    if keep:
        assert counters["evictions"] > 100
