"""What a request is promised when TensorRT-LLM asks what there is of its prompt."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lmcache.adapters.trtllm.tracked import Tracked
from lmcache.adapters.trtllm.translate import identity_of, inserts_of, tokens_of
from lmcache.core.log import init_logger

if TYPE_CHECKING:
    from lmcache.core.client import CacheClient
    from lmcache.core.config import Config
    from lmcache.core.decider import Hit
    from lmcache.core.keys import Namespace

logger = init_logger(__name__)

ASK_AGAIN_S = 0.001


class Matcher:
    """Leases what it promises: there is no way to take a promise back."""

    def __init__(
        self, config: Config, namespace: Namespace, engine_id: str, page_tokens: int
    ) -> None:
        self._config = config
        self._namespace = namespace
        self._engine_id = engine_id
        self._page_tokens = page_tokens
        self._declined = 0
        """Prompts of which TensorRT-LLM had a part of a block."""

    def match(self, cache: CacheClient, request: Any, local: int) -> Tracked | None:
        """A request of which TensorRT-LLM has `local` tokens; None for one that has no key.

        What it is promised ends with a block, and before its last token.
        """
        inserts = inserts_of(request)
        if inserts is None:
            return None
        identity = identity_of(request, self._engine_id)
        chain = cache.chain(self._namespace, identity, tokens_of(request), inserts)
        tracked = Tracked(cache, chain, len(chain.tokens), local, local)
        if local % self._page_tokens:
            self._decline()
        else:
            self._find(tracked, str(request.request_id))
        return tracked

    def sum_up(self) -> None:
        """Say what was declined since the last call."""
        if self._declined:
            logger.warning("nothing was loaded for %d prompts with a partial match", self._declined)
            self._declined = 0

    # ----

    def _find(self, tracked: Tracked, owner: str) -> None:
        """Lease what can be promised."""
        try:
            hit = self._look_up(tracked, owner)
        except BaseException:
            tracked.cache.release(owner, None)
            raise
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

    def _decline(self) -> None:
        self._declined += 1
        if self._declined == 1:
            logger.warning(
                "a prompt of which TensorRT-LLM has a part of a block: nothing is loaded for such "
                "prompts; set KvCacheConfig(enable_partial_reuse=False)"
            )
