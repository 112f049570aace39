"""The class SGLang uses in-process: 0.5.2 to 0.5.12, and the mode `IP` until 0.5.20."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from lmcache.adapters.sglang.joined import Joined
from lmcache.adapters.sglang.ranks import Ranks
from lmcache.adapters.sglang.settings import load_settings
from lmcache.adapters.sglang.translate import (
    absent_in,
    check_server,
    server_args_of,
    slots_of,
)
from lmcache.core.embedding import embed
from lmcache.core.wall import TOLERATED, Wall, guarded, nothing
from lmcache.plugins.manager import PluginManager

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lmcache.adapters.sglang.metadata import LoadMetadata, StoreMetadata
    from lmcache.adapters.sglang.worker import Loading
    from lmcache.core.attachment import Attachment
    from lmcache.core.config import Config


class LMCacheLayerwiseConnector(Wall):
    """One rank: its share of the memory, and its share of every page."""

    def __init__(  # noqa: PLR0917  (SGLang's order)
        self,
        sgl_config: Any,
        tp_size: int,
        rank: int,
        k_pool: Sequence[torch.Tensor],
        v_pool: Sequence[torch.Tensor],
        config_file: str | None = None,
        tp_group: Any = None,
    ) -> None:
        """Raises `LMCacheError` for what cannot be cached, or cannot be configured so."""
        check_server(server_args_of())
        settings = load_settings(config_file)
        config = settings.config
        self._ranks = Ranks(tp_size, tp_group, k_pool[0].device)
        self._layerwise = config.use_layerwise
        self._cache = Joined(
            sgl_config,
            settings,
            (k_pool, v_pool),
            parallel=f"tp{rank}of{tp_size}",
            ranks=tp_size,
            attach=lambda engine_id: _attach(engine_id, config, tp_size),
        )
        self._owners = itertools.count(1)
        self._loads: list[Loading] = []
        """Those whose last layers are still to come."""

    def chunk_size(self) -> int:
        """Tokens of a chunk."""
        return self._cache.scheduler.chunk_tokens

    def start_load_kv(self, load_metadata: LoadMetadata) -> int:
        """Load what SGLang lacks of a prompt, its first layer at once.

        Returns how many tokens are there from `offset` on, or 0 if SGLang has as many itself.
        """
        slots = slots_of(load_metadata.slot_mapping)
        absent = absent_in(slots)
        loading, tokens = None, 0
        try:
            if self.errors < TOLERATED:
                loading, tokens = self._begin(load_metadata, slots, absent)
        except Exception:
            self.count_error("start_load_kv")
        least = self._ranks.least(tokens)
        if loading is None:
            return 0
        if least <= absent:
            loading.end()
            return 0
        loading.cut(least - absent)
        self._go_on(loading)
        return least - load_metadata.offset

    def load_kv_layerwise(self, layer_id: int) -> None:
        """Layer `layer_id` is about to be read: load the next one, where it is wanted.

        Raises `RuntimeError` if it is not what was promised, since nobody could be told.
        """
        for loading in [load for load in self._loads if load.next == layer_id + 1]:
            if not loading.layer():
                raise RuntimeError("pages that were promised to SGLang cannot be loaded")
            if loading.is_over:
                loading.end()
                self._loads.remove(loading)

    @guarded(nothing)
    def store_kv(self, store_metadata: StoreMetadata) -> None:
        """Store what is not stored yet of a request that has ended.

        Its last token may still be computed, so no chunk that ends with it is complete.
        """
        self._cache.store(store_metadata.token_ids[:-1], slots_of(store_metadata.kv_indices))

    def reset(self) -> None:
        """Drop all that nobody is loading."""
        attachment = self._cache.joining.current()
        if attachment:
            attachment.flights.settle()
            attachment.decider.clear()

    def close(self) -> None:
        """Let go of everything; again does nothing."""
        for loading in self._loads:
            loading.end()
        self._loads.clear()
        self._cache.close()

    # ----

    def _begin(
        self, load_metadata: LoadMetadata, slots: Sequence[int], absent: int
    ) -> tuple[Loading | None, int]:
        """A load whose first layer is there, or all of it, and up to which token it goes."""
        owner = str(next(self._owners))
        scheduler = self._cache.scheduler
        found = scheduler.find(owner, load_metadata.token_ids)
        if found is None:
            return None, 0
        if found.tokens <= absent:
            scheduler.release(found)
            return None, 0
        loading = self._cache.begin(found, slots, absent)
        if loading is None:
            return None, 0
        try:
            is_good = loading.layer() if self._layerwise else loading.whole()
        except BaseException:
            loading.end()
            raise
        return loading, found.tokens if is_good else 0

    def _go_on(self, loading: Loading) -> None:
        if loading.is_over:
            loading.end()
        else:
            self._loads.append(loading)


def _attach(engine_id: str, config: Config, tp_size: int) -> Attachment:
    """Each rank has its share of the memory."""
    share = config.model_copy(update={"max_local_cpu_size": config.max_local_cpu_size / tp_size})
    return embed(engine_id, 1, share, PluginManager())
