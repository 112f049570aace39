"""Where TensorRT-LLM schedules, on its leader: what is loaded, and what each pass stores."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmcache.adapters.trtllm.step import Draft, Step
from lmcache.adapters.trtllm.storing import Storing
from lmcache.adapters.trtllm.translate import blocks_of, identity_of, inserts_of, tokens_of
from lmcache.core.engine import moves_for
from lmcache.core.environment import environment_flag
from lmcache.core.log import init_logger
from lmcache.core.mover import HOLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.core.chain import KeyChain
    from lmcache.core.client import CacheClient
    from lmcache.core.config import Config
    from lmcache.core.decider import Hit
    from lmcache.core.joining import Joining
    from lmcache.core.keys import Namespace

logger = init_logger(__name__)

ASK_AGAIN_S = 0.001
UNSEEN = 16
"""Passes after which a request that is not in them is taken to have ended without a word."""


@dataclass
class Tracked:
    """A request that may still be loaded or stored."""

    cache: CacheClient
    chain: KeyChain
    """Of its prompt, and of what it generates if that is stored too."""
    prompt: int
    """Tokens of the prompt."""
    local: int
    """Tokens that TensorRT-LLM has itself."""
    stop: int
    """Up to which token it was promised to have; `local` for nothing."""
    hit: Hit | None = None
    answer: int = 1
    """Tokens that it may generate; as few as that if nobody says."""
    done: int = 0
    """Up to which token nothing need be stored."""
    sure: int = 0
    """The same, without what is lost if it is in no later pass."""
    blocks: list[int] = field(default_factory=list)
    has_begun: bool = False
    seen: int = 0
    """The number of the pass it was last in, or before which it was asked about."""
    since: float = field(default_factory=time.monotonic)
    """When it was asked about."""

    def may_end(self, valid: int) -> bool:
        """Whether a pass may be the last that knows the first `valid` tokens when it begins."""
        # with TensorRT-LLM's overlap scheduler a pass knows one less than there are
        said = valid - self.prompt + (1 if valid == self.prompt else 2)
        return valid >= self.prompt and said >= self.answer

    @property
    def promised(self) -> int:
        """Tokens that TensorRT-LLM counts on, and that have not been loaded yet."""
        return 0 if self.has_begun else self.stop - self.local


class Scheduler:
    """Keeps the requests in view and turns passes into steps. Never two calls at once."""

    def __init__(
        self,
        config: Config,
        namespace: Namespace,
        engine_id: str,
        join: Callable[[], Joining[Any]],
        *,
        page_tokens: int,
        tells_of_cancels: bool,
    ) -> None:
        """`join` is called when the ranks are sure to be there.

        With `tells_of_cancels`, requests that will not run are told to `forget`, and others may
        wait for their first pass; else a promise that the next pass does not take is void.
        """
        self._config = config
        self._namespace = namespace
        self._engine_id = engine_id
        self._join = join
        self._page_tokens = page_tokens
        self._tells = tells_of_cancels
        self._stores = not environment_flag("LMCACHE_FORCE_SKIP_SAVE")
        self._joining: Joining[Any] | None = None
        self._cache: CacheClient | None = None
        self._tracked: dict[int, Tracked] = {}
        self._storing = Storing()
        self._void: deque[int] = deque(maxlen=UNSEEN)
        """Requests whose promise is void, of which nothing more should be heard."""
        self._passes = 0
        self._declined = 0

    def start(self) -> None:
        """Join the cache, now that the ranks are there; later again does nothing.

        Raises `ConfigError` for what the cache will never have.
        """
        if self._joining is None:
            self._joining = self._join()

    # ---- matching

    def matched_tokens(self, request: Any, local: int) -> int:
        """Tokens beyond TensorRT-LLM's own `local` that will be loaded if it makes room for them.

        They end with a block, and before the prompt's last token.
        """
        self.start()
        self.forget(request.request_id)
        if request.request_id in self._void:
            self._void.remove(request.request_id)
        cache = self._attached()
        tracked = self._new(cache, request, local) if cache else None
        if tracked is None:
            return 0
        self._tracked[request.request_id] = tracked
        if local % self._page_tokens:
            self._decline()
        else:
            self._find(tracked, str(request.request_id))
        return tracked.promised

    def _find(self, tracked: Tracked, owner: str) -> None:
        """Lease what can be promised."""
        hit = self._look_up(tracked, owner)
        most = (tracked.prompt - 1) // self._page_tokens * self._page_tokens
        stop = min(hit.tokens, most) // self._page_tokens * self._page_tokens if hit else 0
        enough = stop - tracked.local >= max(1, self._config.min_retrieve_tokens)
        if hit and enough and tracked.cache.keeps(hit, promised=True):
            tracked.hit, tracked.stop = hit, stop
        else:
            tracked.cache.release(owner, hit)
        tracked.done = hit.tokens if hit else 0
        logger.info(
            "Reqid: %s, Total tokens %d, LMCache hit tokens: %d, need to load: %d",
            owner,
            tracked.prompt,
            tracked.done,
            tracked.promised,
        )

    def _look_up(self, tracked: Tracked, owner: str) -> Hit | None:
        """What is leased, waiting for slower tiers; None if they take too long."""
        deadline = time.monotonic() + self._config.fetch_timeout_ms / 1e3
        while True:
            hit = tracked.cache.lookup(owner, tracked.chain, tracked.prompt)
            if hit is not None or time.monotonic() > deadline:
                return hit
            time.sleep(ASK_AGAIN_S)

    def admitted(self, request_id: int, most: int | None) -> None:
        """A request has blocks, and will generate `most` tokens at most."""
        tracked = self._tracked.get(request_id)
        if tracked and most is not None:
            tracked.answer = most

    def give_up(self, request_id: int, start: int, end: int) -> None:
        """TensorRT-LLM will not use what it was promised of tokens `start` .. `end`."""
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return
        if start <= tracked.local:
            tracked.local = max(tracked.local, min(end, tracked.stop))
        else:
            tracked.stop = min(tracked.stop, start)
        if not tracked.promised:
            self._let_go(request_id, tracked)

    def forget(self, request_id: int) -> None:
        """A request has ended, or begins anew: its blocks may be another's now."""
        self._storing.lose(request_id)
        tracked = self._tracked.pop(request_id, None)
        if tracked:
            self._let_go(request_id, tracked)

    # ---- passes

    def build(self, output: Any) -> Step | None:
        """What all ranks copy with this pass; None if that is nothing."""
        draft = Draft(self._attached() if self._joining else None)
        self._passes += 1
        told = [data.request_id for data in (*output.new_requests, *output.cached_requests)]
        try:
            for data in output.new_requests:
                self._begin(draft, data)
            for data in output.cached_requests:
                tracked = self._tracked.get(data.request_id)
                if tracked:
                    self._go_on(draft, tracked, data, data.computed_position)
            self._drop_unseen()
            for away in self._storing.tell(draft.step, self._passes, told):
                if tracked := self._tracked.get(away):
                    tracked.done = tracked.sure
            return draft.depart()
        except BaseException:
            draft.cancel()
            self._lose_track(output)
            raise

    def _lose_track(self, output: Any) -> None:
        """A pass was not planned: what is known of blocks lacks what it brought."""
        told = {data.request_id for data in output.new_requests}
        for request_id, tracked in list(self._tracked.items()):
            if tracked.has_begun or request_id in told:
                self.forget(request_id)

    def owes(self, output: Any) -> bool:
        """Whether a request of this pass was promised something."""
        tracked = (self._tracked.get(data.request_id) for data in output.new_requests)
        return any(each.promised for each in tracked if each)

    def _begin(self, draft: Draft, data: Any) -> None:
        tracked = self._tracked.get(data.request_id)
        if tracked is None:
            if data.request_id in self._void:
                draft.step.broken = "a request runs whose promise was void"
            return
        promised, hit = tracked.promised, tracked.hit
        tracked.blocks = []
        if hit:
            table = _pages(data)
            first, stop = tracked.local // self._page_tokens, -(-tracked.stop // self._page_tokens)
            if len(table) < stop:
                draft.step.broken = f"{len(table)} blocks for {tracked.stop} promised tokens"
            moves = moves_for(hit.slots, tracked.cache.geometry, table, first, stop)
            draft.load(tracked.cache, hit, moves)
            tracked.hit = None
            tracked.cache.release(str(data.request_id), None)
        tracked.has_begun = True
        self._go_on(draft, tracked, data, data.computed_position + promised)

    def _go_on(self, draft: Draft, tracked: Tracked, data: Any, position: int) -> None:
        """A request is in this pass, which computes its tokens from `position` on."""
        tracked.seen = self._passes
        tracked.blocks += _pages(data)
        last = tracked.prompt
        if self._config.save_decode_cache:
            if position >= tracked.prompt:
                tracked.chain.tokens.extend(data.new_tokens)  # type: ignore[attr-defined]
            last = len(tracked.chain.tokens)
        valid = min(position + data.num_scheduled_tokens, last)
        self._store(draft, data.request_id, tracked, valid)
        if valid == tracked.prompt and not self._config.save_decode_cache:
            del self._tracked[data.request_id]

    def _store(self, draft: Draft, request_id: int, tracked: Tracked, valid: int) -> None:
        """Store what is not stored yet of the first `valid` tokens."""
        cache = draft.cache
        if cache is None or cache is not tracked.cache or not self._stores:
            return
        geometry, may_end = cache.geometry, tracked.may_end(valid)
        tail = valid == tracked.prompt and self._config.save_unfull_chunk
        valid = min(valid, _whole(tracked.blocks) * geometry.page_tokens)
        stop = valid - valid % (geometry.page_tokens if tail else geometry.chunk_tokens)
        tracked.sure = tracked.done  # as it is in this pass
        if stop <= tracked.done:
            return
        slots, _ = cache.reserve(tracked.chain, tracked.done, stop, tail=tail)
        draft.hold(slots)
        tracked.done = stop
        moves = moves_for(slots, geometry, tracked.blocks, 0, len(tracked.blocks))
        if moves:
            draft.step.stores.append((request_id, moves))
            if may_end:
                draft.step.urgent.append(request_id)

    # ----

    def _attached(self) -> CacheClient | None:
        """The attachment as it is now. When it changes, only what was promised still counts."""
        cache = self._joining.current() if self._joining else None
        if cache is not self._cache:
            self._tracked = {i: each for i, each in self._tracked.items() if each.promised}
            self._cache = cache
        return cache

    def _new(self, cache: CacheClient, request: Any, local: int) -> Tracked | None:
        """A request to keep in view; None for one that has no key."""
        inserts = inserts_of(request)
        if inserts is None:
            return None
        identity = identity_of(request, self._engine_id)
        chain = cache.chain(self._namespace, identity, tokens_of(request), inserts)
        return Tracked(cache, chain, len(chain.tokens), local, local, seen=self._passes)

    def _let_go(self, request_id: int, tracked: Tracked) -> None:
        hit, tracked.hit = tracked.hit, None
        tracked.stop = tracked.local
        tracked.cache.release(str(request_id), hit)

    def _drop_unseen(self) -> None:
        """Forget requests that ended without a word."""
        too_old = time.monotonic() - self._config.pin_timeout_sec
        for request_id, tracked in list(self._tracked.items()):
            if tracked.promised:
                if self._tells and tracked.since > too_old:
                    continue  # it waits for its turn
                self._void.append(request_id)
            elif tracked.seen > self._passes - UNSEEN:
                continue
            self.forget(request_id)

    def _decline(self) -> None:
        self._declined += 1
        if self._declined == 1:
            logger.warning(
                "a prompt of which TensorRT-LLM has a part of a block: nothing is loaded for such "
                "prompts; set KvCacheConfig(enable_partial_reuse=False)"
            )

    def close(self) -> None:
        """Stop trying to attach, and let go of what is attached."""
        if self._declined:
            logger.warning("nothing was loaded for %d prompts with a partial match", self._declined)
            self._declined = 0
        if self._joining:
            self._joining.close()
        self._tracked.clear()


def _whole(blocks: list[int]) -> int:
    """How many there are before the first that is not there."""
    return blocks.index(HOLE) if HOLE in blocks else len(blocks)


def _pages(data: Any) -> list[int]:
    return [block if block >= 0 else HOLE for block in blocks_of(data)]
