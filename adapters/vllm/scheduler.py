"""Where vLLM schedules: decides hits and what each step copies. Runs on the scheduler's thread."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lmcache.adapters.vllm.step import Copy, Step
from lmcache.adapters.vllm.translate import (
    identity_of,
    inserts_of,
    must_compute,
    options_of,
    why_unkeyable,
)
from lmcache.core.chain import KeyChain
from lmcache.core.engine import moves_for
from lmcache.core.environment import environment_flag
from lmcache.core.keys import root_key
from lmcache.core.log import init_logger
from lmcache.core.receipts import Reason

if TYPE_CHECKING:
    from lmcache.core.attachment import Attachment, Joining
    from lmcache.core.config import Config
    from lmcache.core.decider import Hit
    from lmcache.core.keys import Namespace
    from lmcache.core.leases import Lease
    from lmcache.core.index import Slot

logger = init_logger(__name__)

NULL_PAGE = 0
"""vLLM's block 0 stands for "no block"; its content is nobody's."""


@dataclass
class Tracked:
    """What we know of one request between two calls."""

    request: Any
    """vLLM's live object."""
    chain: KeyChain
    may_load: bool
    may_store: bool
    pages: list[int] = field(default_factory=list)
    local: int = 0
    """Tokens that vLLM's own prefix cache has."""
    hit: Hit | None = None
    load: int = 0
    """Tokens beyond `local` that vLLM made room for and we are to load."""
    done: int = 0
    """Tokens stored, on their way or known to be stored."""
    computed: int = 0
    """Tokens whose KV is in the pages after the last step built."""
    loaded: int = 0
    running: bool = False

    def restart(self) -> None:
        """vLLM asks about it anew: it was preempted, and its pages are gone."""
        self.pages, self.local, self.load = [], 0, 0
        self.done, self.computed, self.running = 0, 0, False


class Draft:
    """A step in the making, and what it holds in the decider until it departs."""

    def __init__(self, cache: Attachment) -> None:
        self.cache = cache
        self.step = Step()
        self._leases: list[Lease] = []
        self._loaded: list[Slot] = []
        self._stored: list[Slot] = []

    def load(self, tracked: Tracked) -> None:
        """Add the load that vLLM made room for, if any."""
        hit, tracked.hit = tracked.hit, None
        if not tracked.load or not hit or not hit.lease:
            return
        geometry = self.cache.geometry
        first = tracked.local // geometry.page_tokens
        stop = -(-(tracked.local + tracked.load) // geometry.page_tokens)
        self._leases.append(hit.lease)
        self._loaded.extend(hit.slots)
        moves = moves_for(hit.slots, geometry, tracked.pages, first, stop)
        request = tracked.request
        self.step.loads.append(
            Copy(request.request_id, moves, tracked.load, hit.tokens, request.num_tokens)
        )
        tracked.loaded, tracked.load = tracked.load, 0
        tracked.done = max(tracked.done, hit.tokens)

    def store(self, tracked: Tracked, stop: int, *, tail: bool) -> None:
        """Add a store of the tokens up to `stop` that are not stored yet."""
        cache, start = self.cache, tracked.done
        slots, reason = cache.decider.reserve(tracked.chain, cache.geometry, start, stop, tail=tail)
        self._stored.extend(slots)
        moves = moves_for(slots, cache.geometry, tracked.pages, 0, len(tracked.pages))
        tracked.done = stop
        if reason is not Reason.NONE:
            last = slots[-1].chunk + 1 if slots else start // cache.geometry.chunk_tokens
            tracked.done = last * cache.geometry.chunk_tokens
        if moves:
            tokens = sum(len(move.pages) for move in moves) * cache.geometry.page_tokens
            request = tracked.request
            self.step.stores.append(
                Copy(request.request_id, moves, tokens, stop - start, request.num_tokens)
            )

    def depart(self) -> Step:
        """The step, ready to be sent; what it holds is in the air from now on."""
        if self.step.loads or self.step.stores:
            self.step.number = self.cache.flights.depart(self._stored, self._leases, self._loaded)
        return self.step

    def cancel(self) -> None:
        """The step will not be sent: let go of everything."""
        for lease in self._leases:
            self.cache.decider.release(lease)
        for slot in self._stored:
            self.cache.decider.abandon(slot)


class SchedulerSide:
    """Keeps the requests in view and turns vLLM's schedule into steps for the workers."""

    def __init__(
        self, config: Config, namespace: Namespace, joining: Joining, *, role: str, details: bool
    ) -> None:
        """With `details`, each response says how many of its tokens were loaded."""
        self._config = config
        self._namespace = namespace
        self._joining = joining
        self._loads = role in ("kv_consumer", "kv_both")
        self._stores = role in ("kv_producer", "kv_both") and not environment_flag(
            "LMCACHE_FORCE_SKIP_SAVE"
        )
        self._details = details
        self._tracked: dict[str, Tracked] = {}
        self._cache: Attachment | None = None

    # ---- matching

    def matched_tokens(self, request: Any, local: int) -> int | None:
        """Tokens beyond vLLM's own `local` that can be loaded now; None to be asked again."""
        cache = self._attached()
        if cache is None:
            return 0
        tracked = self._track(cache, request)
        if not tracked.may_load:
            return 0
        known = tracked.hit
        hit = self._hit(cache, tracked)
        if hit is None:
            return None
        tracked.local = local
        need = max(0, hit.tokens - local - (hit.tokens == request.num_tokens))
        if known is None:
            logger.info(
                "Reqid: %s, Total tokens %d, LMCache hit tokens: %d, need to load: %d",
                request.request_id,
                request.num_tokens,
                hit.tokens,
                need,
            )
        return need if need >= self._config.min_retrieve_tokens else 0

    def allocated(self, request: Any, external: int) -> None:
        """vLLM made room for `external` tokens of ours: as many as we said, fewer or none."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or self._cache is None:
            return
        self._cache.tiers.forget(request.request_id)
        tracked.load = external
        if external == 0 and tracked.hit:
            self._cache.decider.release(tracked.hit.lease)
            tracked.done = tracked.hit.tokens
            tracked.hit = None

    def finished(self, request: Any) -> dict[str, Any] | None:
        """A request has ended, whether it ever ran or not. What its response should say."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return None
        if self._cache:
            self._cache.tiers.forget(request.request_id)
            if tracked.hit:
                self._cache.decider.release(tracked.hit.lease)
        said: dict[str, Any] = {}
        if self._details:
            said["num_lmcache_cached_tokens"] = tracked.loaded
        if options_of(request).get("ret_first_tok") and request.output_token_ids:
            said["first_tok"] = request.output_token_ids[0]
        return said or None

    # ---- steps

    def build(self, scheduled: Any) -> Step:
        """What the workers copy with this step of vLLM."""
        cache = self._attached()
        if cache is None:
            return Step()
        draft = Draft(cache)
        try:
            for new in scheduled.scheduled_new_reqs:
                tracked = self._tracked.get(new.req_id)
                if tracked:
                    tracked.pages = list(new.block_ids[0])
                    self._plan(draft, tracked, new.num_computed_tokens, scheduled)
            cached = scheduled.scheduled_cached_reqs
            for i, request_id in enumerate(cached.req_ids):
                tracked = self._tracked.get(request_id)
                if tracked:
                    if cached.new_block_ids[i] is not None:
                        fresh = tracked.pages if request_id not in cached.resumed_req_ids else []
                        tracked.pages = fresh + list(cached.new_block_ids[i][0])
                    self._plan(draft, tracked, cached.num_computed_tokens[i], scheduled)
            return draft.depart()
        except BaseException:
            draft.cancel()
            raise

    def _plan(self, draft: Draft, tracked: Tracked, before: int, scheduled: Any) -> None:
        """Plan one request whose first `before` tokens are in its pages before the step."""
        request = tracked.request
        tracked.running = True
        draft.load(tracked)
        if before < tracked.computed:  # a load failed, and vLLM went back to compute the rest
            tracked.done = min(tracked.done, before)
        prompt = request.num_prompt_tokens
        settled = tracked.computed >= prompt and not self._config.save_decode_cache
        tracked.computed = before + scheduled.num_scheduled_tokens[request.request_id]
        if not tracked.may_store or (settled and before >= prompt):
            return
        stop = min(tracked.computed, request.num_tokens)
        if not self._config.save_decode_cache:
            stop = min(stop, prompt)
        tail = stop == prompt and self._config.save_unfull_chunk
        geometry = draft.cache.geometry
        stop -= stop % (geometry.page_tokens if tail else geometry.chunk_tokens)
        if stop > tracked.done:
            draft.store(tracked, stop, tail=tail)

    def close(self) -> None:
        """Stop trying to attach, and let go of what is attached."""
        self._joining.close()

    # ----

    def _attached(self) -> Attachment | None:
        """The attachment as it is now. When it changes, all we knew of it is void."""
        cache = self._joining.current()
        if cache is not self._cache:
            self._tracked.clear()
            self._cache = cache
        if cache:
            cache.flights.settle()
        return cache

    def _track(self, cache: Attachment, request: Any) -> Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            tracked = self._tracked[request.request_id] = self._new(cache, request)
        elif tracked.running:
            tracked.restart()
        return tracked

    def _new(self, cache: Attachment, request: Any) -> Tracked:
        geometry = cache.geometry
        namespace = replace(self._namespace, layout=geometry.layout.hex())
        chain = KeyChain(
            root_key(namespace, identity_of(request)),
            request.all_token_ids,
            page_tokens=geometry.page_tokens,
            pages_per_chunk=geometry.pages_per_chunk,
            inserts=inserts_of(request),
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

    def _hit(self, cache: Attachment, tracked: Tracked) -> Hit | None:
        """The hit of a request, leased: the one it has, if that still holds."""
        if tracked.hit and tracked.hit.lease in cache.decider.leases:
            return tracked.hit
        request = tracked.request
        hit = cache.tiers.lookup(
            request.request_id, tracked.chain, cache.geometry, request.num_tokens
        )
        tracked.hit = hit or tracked.hit
        return hit
