"""The class SGLang uses from 0.5.21 on: its unified radix tree, with a server behind it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lmcache.adapters.sglang.joined import Joined
from lmcache.adapters.sglang.operations import Load, Lookup, Operation
from lmcache.adapters.sglang.ranks import Ranks
from lmcache.adapters.sglang.settings import load_settings
from lmcache.adapters.sglang.translate import slots_of, unified_pools
from lmcache.core.errors import ConfigError
from lmcache.core.log import init_logger
from lmcache.core.wall import TOLERATED, Wall, guarded, nothing

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

logger = init_logger(__name__)

PENDING = -1


class UnifiedLMCacheMPConnector(Wall):
    """One rank, as an engine of its own at the server."""

    operation_timeout = 60.0
    """Seconds that SGLang waits for a copy under way when it is flushed or ends."""

    def __init__(  # noqa: PLR0913  (SGLang's)
        self,
        *,
        config_file: str | None,
        model_config: Any,
        tp_size: int,
        tp_rank: int,
        tp_group: Any,
        pp_size: int,
        pp_rank: int,
        pp_group: Any,
        page_size: int,
        token_to_kv_pool_allocator: Any,
        req_to_token_pool: Any,
        tree_components: Sequence[Any],
        mamba_component: Any,
        sliding_window_size: int | None,
    ) -> None:
        """Raises `LMCacheError` for what cannot be cached, or cannot be configured so."""
        settings = load_settings(config_file)
        k_pool, v_pool = unified_pools(
            token_to_kv_pool_allocator.get_kvcache(), tree_components, sliding_window_size
        )
        self._allocator = token_to_kv_pool_allocator
        self._page_size = page_size
        self._tp = Ranks(tp_size, tp_group)
        self._pp = Ranks(pp_size, pp_group)
        self._cache = Joined(
            model_config,
            settings,
            (k_pool, v_pool),
            parallel=f"tp{tp_rank}of{tp_size}.pp{pp_rank}of{pp_size}",
            ranks=tp_size * pp_size,
        )
        self.chunk_size = self._cache.scheduler.chunk_tokens
        """An attribute here, where earlier versions call a method."""
        self._lookups: dict[str, Lookup] = {}
        self._stored: dict[str, int] = {}
        """Up to which token each request needs no more storing."""
        if self.chunk_size % page_size:
            self.close()
            raise ConfigError(
                f"the server's chunks of {self.chunk_size} tokens are not whole pages of "
                f"{page_size} (--page-size)"
            )

    # ---- lookups

    def build_cache_salt(self, cache_salt: str | None, extra_key: str | None) -> str:
        """What keeps requests of one salt, adapter or other extra key from those of another.

        A salt alone stands for itself, as with other engines.
        """
        salt = cache_salt or ""
        is_plain = not extra_key and not salt.startswith("[")
        return salt if is_plain else json.dumps([cache_salt, extra_key])

    def submit_lookup(
        self, request_id: str, token_ids: Sequence[int], *, local_hit_tokens: int, cache_salt: str
    ) -> Lookup:
        """Begin to look a prompt up."""
        self._forget(request_id)
        can_hit = self._cache.scheduler.whole(len(token_ids)) > 0
        lookup = Lookup(request_id, None, can_hit=can_hit)
        try:
            if lookup.can_hit and self.errors < TOLERATED:
                lookup.asked = self._cache.scheduler.ask(request_id, token_ids, cache_salt)
        except Exception:
            self.count_error("submit_lookup")
        self._lookups[request_id] = lookup
        return lookup

    def poll_lookup(self, lookup: Lookup) -> int | None:
        """How many tokens every rank has leased; None as long as one of them does not know."""
        if not lookup.can_hit:
            return 0
        tokens = 0
        try:
            tokens = self._poll(lookup)
        except Exception:
            self.count_error("poll_lookup")
            self._give_up(lookup)
        least = self._least(tokens)
        if least == PENDING:
            return None
        self._stored[lookup.request_id] = least
        return least

    def free_lookup_locks(self, request_id: str, *, start: int, end: int) -> None:
        """SGLang will not load these tokens; with the last of them nothing is leased any more."""
        lookup = self._lookups.get(request_id)
        if lookup is None or lookup.found is None:
            return
        lookup.lock_start = max(lookup.lock_start, end)
        if lookup.lock_start >= lookup.found.tokens:
            self._forget(request_id)

    def parallel_all_reduce(self, tensor: torch.Tensor, op: Any) -> None:
        """Reduce in place over all ranks of the model."""
        self._tp.reduce(tensor, op)
        self._pp.reduce(tensor, op)

    # ---- loads

    def device_indices_by_group(
        self,
        full_indices: torch.Tensor,
        *,
        mamba_value: torch.Tensor | None = None,
        mamba_transfer_tokens: int | None = None,
    ) -> list[torch.Tensor]:
        """Where the tokens lie in the pool; there is one group."""
        translate = getattr(self._allocator, "translate_kv_indices_for_transfer", None)
        return [translate(full_indices) if translate else full_indices]

    def submit_load(
        self,
        lookup: Lookup,
        groups: Sequence[torch.Tensor],
        *,
        local_hit_tokens: int,
        owned_device_indices: torch.Tensor,
        producer_stream: Any,
    ) -> Load:
        """Load the tokens after those that SGLang has, once `producer_stream` is done with them.

        Never raises: the other ranks would wait for this one.
        """
        load = Load(
            lookup.request_id,
            local_hit_tokens,
            local_hit_tokens=local_hit_tokens,
            device_indices=owned_device_indices,
        )
        is_good = False
        try:
            if not self._falls_short(lookup, len(owned_device_indices)):
                is_good = self._load(lookup, slots_of(groups[0]), local_hit_tokens, producer_stream)
        except Exception:
            self.count_error("submit_load")
        load.future.set_result(is_good)
        return load

    def prepare_load_on_stream(self, load: Load, stream: Any) -> bool:
        """Whether every rank has loaded; else nothing is written any more."""
        return bool(self._least(int(load.future.result())))

    def complete_load(self, load: Load, *, synchronize: bool = True) -> bool:
        """Whether a load that has ended is good on every rank."""
        return self._complete(load, synchronize=synchronize)

    # ---- stores

    def get_store_start(self, request_id: str, end: int) -> int:
        """Up to which token, at most `end`, nothing has to be stored."""
        return min(self._stored.get(request_id, 0), self._cache.scheduler.whole(end))

    def submit_store(
        self,
        request_id: str,
        token_ids: Sequence[int],
        groups: Sequence[torch.Tensor],
        *,
        device_indices_start: int,
        cache_salt: str,
    ) -> Operation | None:
        """Store whole chunks from `device_indices_start` on; None if there are none."""
        slots = slots_of(groups[0])
        stop = self._cache.scheduler.whole(len(token_ids))
        if stop <= device_indices_start or min(slots, default=0) < self._page_size:
            return None  # the first page is nobody's
        store = Operation(request_id, device_indices_start)
        is_good = False
        try:
            is_good = self._cache.store(token_ids, slots, device_indices_start, cache_salt)
        except Exception:
            self.count_error("submit_store")
        self._stored[request_id] = stop
        store.future.set_result(is_good)
        return store

    def complete_store(self, store: Operation, *, synchronize: bool = True) -> bool:
        """Whether a store that has ended is good on every rank; else it may be made again."""
        is_good = self._complete(store, synchronize=synchronize)
        if not is_good and store.request_id in self._stored:
            self._stored[store.request_id] = min(store.start, self._stored[store.request_id])
        return is_good

    def ready_prefix_count(self, operations: Sequence[Operation]) -> int:
        """How many of them, from the first on, have ended on every rank."""
        if not operations:
            return 0
        ended = [operation.query() for operation in operations]
        return self._least(ended.index(False) if False in ended else len(ended))

    # ---- ends

    def finish_request(self, request_id: str) -> None:
        """The request has ended, or was never known."""
        self._forget(request_id)
        self._stored.pop(request_id, None)

    def end_all_sessions(self) -> None:
        """SGLang knows of no request any more."""
        for request_id in {*self._lookups, *self._stored}:
            self.finish_request(request_id)

    def clear(self) -> bool:
        """The server's chunks are not one engine's to drop."""
        logger.warning("`lmcache kvcache clear` drops what the server holds, for all engines")
        return False

    def close(self) -> None:
        """Let go of everything; again does nothing."""
        self._lookups.clear()
        self._cache.close()

    # ----

    def _least(self, number: int) -> int:
        return self._pp.least(self._tp.least(number))

    def _poll(self, lookup: Lookup) -> int:
        if lookup.asked:
            is_over, lookup.found = self._cache.scheduler.poll(lookup.asked)
            if not is_over:
                return PENDING
            lookup.asked = None
        return lookup.found.tokens if lookup.found else 0

    def _falls_short(self, lookup: Lookup, tokens: int) -> bool:
        """Whether SGLang counts on more, of which it ends.

        It has then evicted a part of what it had itself when the prompt was looked up. A load that
        fails makes it compute the prompt.
        """
        promised = lookup.flow.promised if lookup.flow else 0
        if promised > tokens:
            logger.info(
                "SGLang has evicted the %d tokens before what it loads of request %s: not loaded",
                promised - tokens,
                lookup.request_id,
            )
        return promised > tokens

    def _load(self, lookup: Lookup, fresh: Sequence[int], local: int, producer_stream: Any) -> bool:
        found, lookup.found = lookup.found, None
        if found is None:
            return False
        return self._cache.load(found, [-1] * local + list(fresh), local, after=producer_stream)

    def _complete(self, operation: Operation, *, synchronize: bool) -> bool:
        if operation.result is None:
            is_good = operation.query() and operation.future.result()
            operation.result = bool(self._least(int(is_good))) if synchronize else is_good
        return operation.result

    def _forget(self, request_id: str) -> None:
        if lookup := self._lookups.pop(request_id, None):
            self._give_up(lookup)

    @guarded(nothing)
    def _give_up(self, lookup: Lookup) -> None:
        """Nothing of it is wanted any more."""
        asked, found = lookup.asked, lookup.found
        lookup.asked = lookup.found = None
        if asked:
            self._cache.scheduler.give_up(asked)
        if found:
            self._cache.scheduler.release(found)
