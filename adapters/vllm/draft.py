"""A step in the making: requests in, copies out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmcache.adapters.vllm.groups import NULL_PAGE
from lmcache.adapters.vllm.step import Copy, Step
from lmcache.adapters.vllm.translate import stored_event
from lmcache.core.engine import moves_for_groups
from lmcache.core.receipts import Reason

if TYPE_CHECKING:
    from lmcache.adapters.vllm.groups import Groups, Tables
    from lmcache.core.chain import KeyChain
    from lmcache.core.client import CacheClient
    from lmcache.core.decider import Hit
    from lmcache.core.index import Slot


@dataclass
class Tracked:
    """What we know of one request between two calls."""

    request: Any
    """vLLM's live object."""
    chain: KeyChain
    may_load: bool
    may_store: bool
    tables: Tables = field(default_factory=list)
    local: int = 0
    """Tokens that vLLM's own prefix cache has."""
    found: int = 0
    """Tokens that a lookup found, those that vLLM has included."""
    hit: Hit | None = None
    load: int = 0
    """Tokens beyond `local` that vLLM made room for and we are to load."""
    done: int = 0
    """Tokens stored, on their way or known to be stored."""
    computed: int = 0
    """Tokens whose KV is in the pages after the last step built."""
    loaded: int = 0
    at: int = 0
    """Where the next window of a load begins that memory cannot hold at once."""
    running: bool = False
    awaited: bool = False
    """vLLM made room for a load outside the batch and has not computed anything since."""

    def restart(self) -> None:
        """vLLM asks about it anew: it was preempted, and its pages are gone."""
        self.tables, self.local, self.load, self.at = [], 0, 0, 0
        self.done, self.computed, self.running, self.awaited = 0, 0, False, False


class Draft:
    """A step in the making, and what it holds in the decider until it departs."""

    def __init__(self, cache: CacheClient, groups: Groups, *, events: bool) -> None:
        self.cache = cache
        self._groups = groups
        self.step = Step(attachment=cache.number)
        self._events = events
        self._loaded: list[Hit] = []
        self._stored: list[Slot] = []

    def load(self, tracked: Tracked) -> bool:
        """Add the load that vLLM made room for; False if there is none, or it cannot be made."""
        hit, tracked.hit = tracked.hit, None
        request = tracked.request
        wanted, tracked.load = tracked.load, 0
        end = tracked.local + wanted
        if not wanted or not hit or not self._is_restorable(end, hit):
            self.cache.release(request.request_id, hit)
            return False
        assert hit.tokens + hit.more >= end, f"{wanted} tokens wanted of {hit.tokens}"
        tracked.loaded, tracked.at = wanted, 0
        self.load_window(tracked, hit)
        return True

    def load_window(self, tracked: Tracked, hit: Hit) -> bool:
        """Add what `hit` has of a load, from where the last window ended; whether that is all."""
        page_tokens, request = self.cache.geometry.page_tokens, tracked.request
        begin, end = max(tracked.local, tracked.at), tracked.local + tracked.loaded
        tracked.done = max(tracked.done, tracked.at + hit.tokens)
        tracked.at = min(end, tracked.at + hit.tokens)
        is_last = tracked.at == end
        if tracked.at <= begin:  # vLLM has all of it
            self.cache.release(request.request_id, hit)
            return False
        self._loaded.append(hit)
        first, stop = begin // page_tokens, -(-tracked.at // page_tokens)
        tables = self._groups.granted(tracked.tables)
        assert all(len(table) >= stop for table in tables), "the page table ends before the hit"
        moves = moves_for_groups(hit.slots, self.cache.geometry, tables, first, stop)
        tokens, total = tracked.at - begin, request.num_tokens
        self.step.loads.append(
            Copy(request.request_id, moves, tokens, hit.tokens, total, is_last=is_last)
        )
        return is_last

    def store(self, tracked: Tracked, before: int, stop: int, *, tail: bool) -> None:
        """Add a store of the tokens up to `stop` that are not stored yet.

        The first `before` of them were computed before this step.
        """
        cache, request = self.cache, tracked.request
        if not self._groups.keep_all:
            # what ended earlier may have lost pages that whoever continues from there looks at;
            # vLLM takes none away for the sake of tokens whose step has not come back yet
            before -= getattr(request, "num_in_flight_tokens", 0)
            tracked.done = max(tracked.done, before - before % cache.geometry.chunk_tokens)
            if stop <= before:
                return
        start = tracked.done
        slots, reason = cache.reserve(tracked.chain, start, stop, tail=tail)
        self._stored.extend(slots)
        tracked.done = stop
        if reason is not Reason.NONE:
            last = slots[-1].chunk + 1 if slots else start // cache.geometry.chunk_tokens
            tracked.done = last * cache.geometry.chunk_tokens
        if not slots:
            return
        tables = self._groups.kept(tracked.tables, before, cache.geometry.page_tokens)
        shortest = min(len(table) for table in tables)
        moves = moves_for_groups(slots, cache.geometry, tables, 0, shortest)
        assert len(moves) == len(slots), "the page table ends before the tokens do"
        for move in moves:
            asked = move.slot_pages * len(tables)
            assert len(move.pages) == asked, "the page table ends inside a chunk"
            assert NULL_PAGE not in move.pages, "a page of the prompt does not exist"
        copy = Copy(
            request_id=request.request_id,
            moves=moves,
            tokens=cache.geometry.tokens_in(slots),
            required=stop - start // cache.geometry.chunk_tokens * cache.geometry.chunk_tokens,
            total=request.num_tokens,
        )
        if self._events:
            geometry, chain = cache.geometry, tracked.chain
            copy.events = [stored_event(slot, geometry, chain, request) for slot in slots]
        self.step.stores.append(copy)

    def _is_restorable(self, stop: int, hit: Hit) -> bool:
        """Whether every group has what a token at `stop` looks at, once the hit is loaded."""
        return self._groups.keep_all or hit.tokens - 1 <= stop

    def depart(self) -> Step:
        """The step, ready to be sent; what it holds is in the air from now on."""
        self.step.number = self.cache.depart(self._stored, self._loaded)
        return self.step

    def cancel(self) -> None:
        """The step will not be sent: let go of everything."""
        self.cache.cancel(self._stored, self._loaded)
