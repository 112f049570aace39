"""Where TensorRT-LLM schedules, on its leader: what is loaded, and what each pass stores."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from lmcache.adapters.trtllm.matching import Matcher
from lmcache.adapters.trtllm.step import Draft, Step
from lmcache.adapters.trtllm.storing import Storing
from lmcache.adapters.trtllm.translate import blocks_of
from lmcache.core.engine import moves_for
from lmcache.core.environment import environment_flag
from lmcache.core.mover import HOLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lmcache.adapters.trtllm.asking import Asker
    from lmcache.adapters.trtllm.tracked import Tracked
    from lmcache.core.client import CacheClient
    from lmcache.core.config import Config
    from lmcache.core.decider import Hit
    from lmcache.core.joining import Joining
    from lmcache.core.keys import Namespace
    from lmcache.core.mover import Move

UNSEEN = 16
"""Passes after which a request that is not in them is taken to have ended without a word."""


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
        asker: Callable[[], Asker | None],
        tells_of_cancels: bool,
        outside: bool,
    ) -> None:
        """`join` is called when the ranks are sure to be there.

        There is an `asker` from then on.
        With `tells_of_cancels`, requests that will not run are told to `forget`, and others may
        wait for their first pass; else a promise that the next pass does not take is void.
        With `outside`, which needs that, requests wait for their loads outside the batch.
        """
        self._config = config
        self._matcher = Matcher(config, namespace, engine_id, page_tokens)
        self._join = join
        self._asker = asker
        self._page_tokens = page_tokens
        self._tells = tells_of_cancels
        self._outside = outside
        self._stores = not environment_flag("LMCACHE_FORCE_SKIP_SAVE")
        self._joining: Joining[Any] | None = None
        self._cache: CacheClient | None = None
        self._tracked: dict[int, Tracked] = {}
        self._parked: dict[int, Tracked] = {}
        """Requests that have blocks, and wait for loads that no rank has been told of."""
        self._storing = Storing()
        self._void: deque[int] = deque(maxlen=UNSEEN)
        """Requests whose promise is void, of which nothing more should be heard."""
        self._passes = 0
        self.keeps_blocks = False
        """Whether a request that ends has its blocks until the ranks say that they are stored."""

    def start(self) -> None:
        """Join the cache, now that the ranks are there; later again does nothing.

        Raises `ConfigError` for what the cache will never have.
        """
        if self._joining is None:
            self._joining = self._join()

    # ---- matching

    def matched_tokens(self, request: Any, local: int) -> tuple[int, bool]:
        """Tokens beyond TensorRT-LLM's own `local` that will be loaded if it makes room for them.

        They end with a block, and before the prompt's last token. And whether it has to wait for
        them outside the batch.
        """
        self.start()
        self.forget(request.request_id)
        if request.request_id in self._void:
            self._void.remove(request.request_id)
        cache = self._attached()
        tracked = self._matcher.match(cache, request, local) if cache else None
        if tracked is None:
            return 0, False
        tracked.seen = self._passes
        self._tracked[request.request_id] = tracked
        tracked.waits = self._outside and tracked.promised > 0
        return tracked.promised, tracked.waits

    def admitted(self, request_id: int, blocks: Iterable[int]) -> None:
        """A request has `blocks`."""
        tracked = self._tracked.get(request_id)
        if tracked and tracked.waits:
            tracked.blocks = _pages(blocks)
            self._parked[request_id] = tracked

    def give_up(self, request_id: int, start: int, end: int) -> None:
        """TensorRT-LLM will not use what it was promised of tokens `start` .. `end`."""
        tracked = self._tracked.get(request_id)
        if tracked is None or start >= end:
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
        self._parked.pop(request_id, None)
        tracked = self._tracked.pop(request_id, None)
        if tracked:
            self._let_go(request_id, tracked)

    def finished(self, request_id: int) -> bool:
        """A request has ended; whether the ranks have to be asked if its blocks are stored.

        If it does not have them until then, they are when this returns, or it is too late.
        """
        number = self._storing.unsaid(request_id)
        asks = number > 0
        try:
            if asks and not self.keeps_blocks:
                asker = self._asker()
                asks = asker is not None and asker.ask(request_id, number)
            if asks:
                self._storing.end(request_id)
        finally:
            self.forget(request_id)
        return asks

    # ---- passes

    def build(self, output: Any) -> Step | None:
        """What all ranks copy with this pass; None if that is nothing."""
        draft = Draft(self._attached() if self._joining else None)
        self._passes += 1
        draft.step.pass_number = self._passes
        told = [data.request_id for data in (*output.new_requests, *output.cached_requests)]
        parked, self._parked = self._parked, {}
        try:
            for request_id, waiting in parked.items():
                self._load_outside(draft, request_id, waiting)
            for data in output.new_requests:
                self._begin(draft, data)
            for data in output.cached_requests:
                tracked = self._tracked.get(data.request_id)
                if tracked:
                    tracked.blocks += _pages(blocks_of(data))
                    self._go_on(draft, tracked, data, data.computed_position)
            self._drop_unseen()
            for away in self._storing.tell(draft.step, told):
                if tracked := self._tracked.get(away):
                    tracked.done = tracked.sure
            return draft.depart()
        except BaseException:
            draft.cancel()
            self._storing.take_back(draft.step)
            self._lose_track(output)
            raise

    def _lose_track(self, output: Any) -> None:
        """A pass was not planned: what is known of blocks lacks what it brought."""
        told = {data.request_id for data in output.new_requests}
        for request_id, tracked in list(self._tracked.items()):
            if tracked.has_begun or request_id in told:
                self.forget(request_id)

    def owes(self, output: Any) -> bool:
        """Whether a request was promised something that this pass has to begin to load."""
        new = (self._tracked.get(data.request_id) for data in output.new_requests)
        return any(each.promised for each in (*new, *self._parked.values()) if each)

    def _begin(self, draft: Draft, data: Any) -> None:
        tracked = self._tracked.get(data.request_id)
        if tracked is None:
            if data.request_id in self._void:
                draft.step.broken = "a request runs whose promise was void"
            return
        promised, tracked.blocks = tracked.promised, _pages(blocks_of(data))
        if promised:
            draft.load(*self._due(draft, data.request_id, tracked))
        tracked.has_begun = True
        self._go_on(draft, tracked, data, data.computed_position + promised)

    def _load_outside(self, draft: Draft, request_id: int, tracked: Tracked) -> None:
        """Its first pass will come when it has what it was promised, as if that were local.

        That pass computes what TensorRT-LLM has made no room for.
        """
        room = len(tracked.blocks) * self._page_tokens
        tracked.stop = max(tracked.local, min(tracked.stop, room))
        if tracked.promised:
            draft.load_outside(request_id, *self._due(draft, request_id, tracked))
            tracked.local = tracked.stop
        else:
            self._let_go(request_id, tracked)
            draft.step.excused.append(request_id)

    def _due(
        self, draft: Draft, request_id: int, tracked: Tracked
    ) -> tuple[CacheClient, Hit, list[Move]]:
        """What is to be copied to the blocks of a request, which holds it no longer."""
        hit, tracked.hit = tracked.hit, None
        assert hit, "what was promised is leased"
        first, stop = tracked.local // self._page_tokens, -(-tracked.stop // self._page_tokens)
        if len(tracked.blocks) < stop:
            draft.step.broken = f"{len(tracked.blocks)} blocks for {tracked.stop} promised tokens"
        moves = moves_for(hit.slots, tracked.cache.geometry, tracked.blocks, first, stop)
        tracked.cache.release(str(request_id), None)
        return tracked.cache, hit, moves

    def _go_on(self, draft: Draft, tracked: Tracked, data: Any, position: int) -> None:
        """A request is in this pass, which computes its tokens from `position` on."""
        tracked.seen = self._passes
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
        geometry = cache.geometry
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

    # ----

    def _attached(self) -> CacheClient | None:
        """The attachment as it is now. When it changes, only what was promised still counts."""
        cache = self._joining.current() if self._joining else None
        if cache is not self._cache:
            self._tracked = {i: each for i, each in self._tracked.items() if each.is_awaited}
            self._cache = cache
        return cache

    def _let_go(self, request_id: int, tracked: Tracked) -> None:
        hit, tracked.hit = tracked.hit, None
        tracked.stop = tracked.local
        tracked.cache.release(str(request_id), hit)

    def _drop_unseen(self) -> None:
        """Forget requests that ended without a word."""
        too_old = time.monotonic() - self._config.pin_timeout_sec
        for request_id, tracked in list(self._tracked.items()):
            if tracked.is_awaited:
                if self._tells and tracked.since > too_old:
                    continue  # it waits for its turn
                if tracked.promised:
                    self._void.append(request_id)
            elif tracked.seen > self._passes - UNSEEN:
                continue
            self.forget(request_id)

    def close(self) -> None:
        """Stop trying to attach, and let go of what is attached."""
        self._matcher.sum_up()
        if self._joining:
            self._joining.close()
        self._tracked.clear()


def _whole(blocks: list[int]) -> int:
    """How many there are before the first that is not there."""
    return blocks.index(HOLE) if HOLE in blocks else len(blocks)


def _pages(blocks: Iterable[int]) -> list[int]:
    return [block if block >= 0 else HOLE for block in blocks]
