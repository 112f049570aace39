"""Where vLLM schedules: decides hits and what each step copies. Runs on the scheduler's thread."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lmcache.adapters.vllm.draft import Draft, Tracked
from lmcache.adapters.vllm.groups import Groups, joined, tables_of
from lmcache.adapters.vllm.step import Step
from lmcache.adapters.vllm.streams import Streams
from lmcache.adapters.vllm.translate import (
    identity_of,
    inserts_of,
    must_compute,
    options_of,
    why_unkeyable,
)
from lmcache.core.environment import environment_flag
from lmcache.core.fetch import Asking
from lmcache.core.log import init_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lmcache.adapters.vllm.groups import Tables
    from lmcache.core.client import CacheClient
    from lmcache.core.config import Config
    from lmcache.core.decider import Hit
    from lmcache.core.joining import Joining
    from lmcache.core.keys import Namespace

logger = init_logger(__name__)


@dataclass(frozen=True)
class Promise:
    """Pages that vLLM counts on us to fill, whatever becomes of the cache."""

    first: int
    stop: int
    tables: Tables | None = None
    """The request's page tables, if vLLM waits for the load outside the batch."""


class SchedulerSide:
    """Keeps the requests in view and turns vLLM's schedule into steps for the workers."""

    def __init__(
        self,
        config: Config,
        namespace: Namespace,
        joining: Joining[Any],
        *,
        role: str,
        groups: Groups | None = None,
        details: bool = False,
        outside: bool = False,
        fence_page_tokens: int = 0,
    ) -> None:
        """With `details`, each response says how many of its tokens were loaded.

        With `outside`, requests wait for their loads outside the batch.

        `fence_page_tokens` are those of a page where stores are made behind the engine: then each
        step says which pages were given out with it.
        """
        self._config = config
        self._namespace = namespace
        self._joining = joining
        self._loads = role in ("kv_consumer", "kv_both")
        self._stores = role in ("kv_producer", "kv_both") and not environment_flag(
            "LMCACHE_FORCE_SKIP_SAVE"
        )
        self._details = details
        self._outside = outside
        self._fence_page_tokens = fence_page_tokens
        self._groups = groups or Groups()
        self._tracked: dict[str, Tracked] = {}
        self._promises: dict[str, Promise] = {}
        self._streams = Streams()
        self._due: list[Tracked] = []
        """Those whose loads go out with the next step, though they are not in its batch."""
        self._cache: CacheClient | None = None

    # ---- matching

    def matched_tokens(self, request: Any, local: int) -> int | None:
        """Tokens beyond vLLM's own `local` that can be loaded now; None to be asked again."""
        cache = self._attached()
        if cache is None:
            return 0
        tracked = self._track(cache, request)
        if not tracked.may_load or tracked.awaited:
            return 0  # a load that failed is not tried again: the request would wait for ever
        known = tracked.hit
        if known is None and self._streams.starve:
            return None
        hit = self._hit(cache, tracked)
        if hit is None:
            return None
        tracked.local, tracked.found = local, hit.tokens + hit.more
        # vLLM computes the last token again; what that one looks at must be there, too
        is_whole = tracked.found == request.num_tokens and not (
            self._outside and self._groups.keep_all
        )
        need: int = max(0, tracked.found - local - is_whole)
        if known is None:
            logger.info(
                "Reqid: %s, Total tokens %d, LMCache hit tokens: %d, need to load: %d",
                request.request_id,
                request.num_tokens,
                tracked.found,
                need,
            )
        if need < self._config.min_retrieve_tokens:
            return 0
        self._promise(request, local, need)
        return need

    def prefetch(self, request: Any) -> None:
        """Look a request up before its turn, so that slower tiers are read meanwhile."""
        cache = self._attached()
        if cache is not None:
            tracked = self._track(cache, request)
            if tracked.may_load and not self._streams.starve:
                self._hit(cache, tracked)

    def allocated(self, request: Any, external: int, tables: Tables | None = None) -> None:
        """vLLM made room for `external` tokens of ours: as many as we said, fewer or none.

        With its page `tables`, the request waits for them outside the batch.
        """
        promise = self._promises.pop(request.request_id, None)
        if external and promise:
            self._promises[request.request_id] = replace(promise, tables=tables)
        tracked = self._tracked.get(request.request_id)
        if tracked is None or self._cache is None:
            return
        tracked.load = external
        if external:
            self._promise(request, tracked.local, external, tables)
            if tracked.hit and not self._cache.keeps(tracked.hit, promised=True):
                tracked.hit = None
            if tables is not None:
                tracked.tables, tracked.awaited = tables, True
                self._due.append(tracked)
            return
        if tracked.hit:
            tracked.done = tracked.hit.tokens
        self._let_go(tracked)

    def finished(self, request: Any) -> dict[str, Any] | None:
        """A request has ended, whether it ever ran or not. What its response should say."""
        self._promises.pop(request.request_id, None)
        tracked = self._tracked.pop(request.request_id, None)
        if tracked:
            self._streams.leave(request.request_id)
            self._let_go(tracked)
        said: dict[str, Any] = {}
        if self._details:
            said["num_lmcache_cached_tokens"] = tracked.loaded if tracked else 0
        if options_of(request).get("cached_token_stats"):
            said["cached_token_stats"] = {
                "num_vllm_cached_tokens": tracked.local if tracked else 0,
                "num_lmcache_cached_tokens": tracked.found if tracked else 0,
                "num_lmcache_extra_cached_tokens": tracked.loaded if tracked else 0,
            }
        if options_of(request).get("ret_first_tok") and request.output_token_ids:
            said["first_tok"] = request.output_token_ids[0]
        return said or None

    # ---- steps

    def build(self, scheduled: Any) -> Step:
        """What the workers copy with this step of vLLM."""
        cache = self._attached()
        due, self._due = self._due, []
        if cache is None:
            return self.without_copies(scheduled)
        draft = Draft(cache, self._groups, events=self._config.enable_kv_events)
        try:
            kept = self._load_outside(draft, due)
            for request_id, tables, before in self._scheduled(scheduled):
                tracked = self._tracked[request_id]
                tracked.tables = tables
                if draft.load(tracked):
                    kept.append(request_id)
                self._plan(draft, tracked, before, scheduled.num_scheduled_tokens[request_id])
            step = draft.depart()
        except BaseException:
            draft.cancel()
            raise
        for request_id in kept:
            del self._promises[request_id]
        for request_id, at in self._streams.reached():
            first = at // cache.geometry.page_tokens
            self._promises[request_id] = replace(self._promises[request_id], first=first)
        return self._whole(step, scheduled)

    def _load_outside(self, draft: Draft, due: list[Tracked]) -> list[str]:
        """Add the loads that requests wait for outside the batch; those who then get all of it."""
        kept = self._streams.advance(draft)
        if self._streams.starve:  # they would wait for pages of those who wait for room
            for tracked in self._tracked.values():
                if not tracked.awaited and not tracked.running:
                    self._let_go(tracked)
        for tracked in due:
            if not self._is_current(tracked) or not draft.load(tracked):
                continue
            if tracked.at < tracked.local + tracked.loaded:
                self._streams.begin(tracked)
            else:
                kept.append(tracked.request.request_id)
        return kept

    def without_copies(self, scheduled: Any) -> Step:
        """A step that copies nothing, and says what vLLM must not count on."""
        return self._whole(Step(), scheduled)

    def lose_track(self) -> None:
        """A step was not built: page tables lack what it brought, and are good for nothing more."""
        self._due.clear()
        self._streams.clear()
        for tracked in self._tracked.values():
            self._let_go(tracked)
        self._tracked.clear()

    def _let_go(self, tracked: Tracked) -> None:
        hit, tracked.hit = tracked.hit, None
        if self._cache:
            self._cache.release(tracked.request.request_id, hit)

    def _scheduled(self, scheduled: Any) -> Iterator[tuple[str, Tables, int]]:
        """The tracked requests of a step: id, whole page tables, tokens computed before it."""
        for new in scheduled.scheduled_new_reqs:
            if new.req_id in self._tracked:
                yield new.req_id, tables_of(new.block_ids), new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            if request_id in self._tracked:
                fresh = cached.new_block_ids[i]
                tables = self._tracked[request_id].tables
                if request_id in cached.resumed_req_ids:
                    tables = []
                if fresh:
                    tables = joined(tables, fresh)
                yield request_id, tables, cached.num_computed_tokens[i]

    def _whole(self, step: Step, scheduled: Any) -> Step:
        """The step with what it says whatever it copies."""
        self._own_up(step, scheduled)
        step.is_idle = not scheduled.total_num_scheduled_tokens
        if self._fence_page_tokens:
            step.fresh = list(_fresh(scheduled, self._fence_page_tokens))
        return step

    def _own_up(self, step: Step, scheduled: Any) -> None:
        """Tell the workers what requests were promised and will not get: vLLM must not use it."""
        step.unloaded.extend(self._streams.take_left())
        if not self._promises:
            return
        tables = {new.req_id: new.block_ids for new in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        grown = zip(cached.req_ids, cached.new_block_ids, strict=True)
        tables.update({request_id: fresh for request_id, fresh in grown if fresh})
        for request_id, promise in list(self._promises.items()):
            promised = promise.tables or tables.get(request_id)
            if promised is None or request_id in self._streams:
                continue
            del self._promises[request_id]
            for table in promised:
                step.lost.extend(table[promise.first : promise.stop])
            if promise.tables:
                step.unloaded.append(request_id)

    def _promise(self, request: Any, local: int, need: int, tables: Tables | None = None) -> None:
        """From now on vLLM counts on us to fill these pages, whatever becomes of the cache."""
        assert self._cache
        size = self._cache.geometry.page_tokens
        self._promises[request.request_id] = Promise(
            local // size, -(-(local + need) // size), tables
        )

    def _plan(self, draft: Draft, tracked: Tracked, before: int, count: int) -> None:
        """Plan the stores of a request: `before` tokens are in its pages, `count` follow."""
        request = tracked.request
        if tracked.awaited:  # vLLM computes the last token of a whole hit again
            tracked.computed = max(before, tracked.local + tracked.loaded - 1)
        tracked.running, tracked.awaited = True, False
        if before < tracked.computed:  # a load failed, and vLLM went back to compute the rest
            tracked.done = min(tracked.done, before)
            tracked.loaded = min(tracked.loaded, max(0, before - tracked.local))
        prompt = request.num_prompt_tokens
        settled = tracked.computed >= prompt and not self._config.save_decode_cache
        tracked.computed = before + count
        if not tracked.may_store or (settled and before >= prompt):
            return
        stop = min(tracked.computed, request.num_tokens)
        if not self._config.save_decode_cache:
            stop = min(stop, prompt)
        tail = stop == prompt and self._config.save_unfull_chunk
        geometry = draft.cache.geometry
        stop -= stop % (geometry.page_tokens if tail else geometry.chunk_tokens)
        if stop > tracked.done:
            draft.store(tracked, before, stop, tail=tail)

    def close(self) -> None:
        """Stop trying to attach, and let go of what is attached."""
        self._joining.close()

    # ----

    def _attached(self) -> CacheClient | None:
        """The attachment as it is now. When it changes, all we knew of it is void."""
        cache = self._joining.current()
        if cache is not self._cache:
            self._tracked.clear()
            self._streams.clear()
            self._cache = cache
        return cache

    def _track(self, cache: CacheClient, request: Any) -> Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.request is not request:
            tracked = self._tracked[request.request_id] = self._new(cache, request)
        elif tracked.running:
            tracked.restart()
        return tracked

    def _is_current(self, tracked: Tracked) -> bool:
        """Whether it is still what we know of its request."""
        return self._tracked.get(tracked.request.request_id) is tracked

    def _new(self, cache: CacheClient, request: Any) -> Tracked:
        chain = cache.chain(
            self._namespace, identity_of(request), request.all_token_ids, inserts_of(request)
        )
        limit = self._config.priority_limit
        keyable = not why_unkeyable(request)
        skip = options_of(request).get("lmcache.skip_save") or (
            limit is not None and request.priority > limit
        )
        return Tracked(
            request,
            chain,
            may_load=self._loads and keyable and not must_compute(request),
            may_store=self._stores and keyable and not skip,
        )

    def _hit(self, cache: CacheClient, tracked: Tracked) -> Hit | None:
        """The hit of a request, leased: the one it has, if that still holds."""
        if tracked.hit and cache.keeps(tracked.hit):
            return tracked.hit
        request = tracked.request
        in_windows = self._outside and self._groups.keep_all
        asking = Asking(0, in_windows=in_windows, priority=request.priority)
        hit = cache.lookup(request.request_id, tracked.chain, request.num_tokens, asking)
        tracked.hit = hit or tracked.hit
        return hit


def _fresh(scheduled: Any, page_tokens: int) -> Iterator[int]:
    """Pages given out with a step that hold nothing which has been computed."""
    for new in scheduled.scheduled_new_reqs:
        for table in new.block_ids:
            yield from table[new.num_computed_tokens // page_tokens :]
    cached = scheduled.scheduled_cached_reqs
    for i, request_id in enumerate(cached.req_ids):
        is_whole = request_id in cached.resumed_req_ids
        first = cached.num_computed_tokens[i] // page_tokens if is_whole else 0
        for table in cached.new_block_ids[i] or ():
            yield from table[first:]
