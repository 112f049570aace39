"""The class SGLang uses with a server: the mode `MP` of 0.5.13 to 0.5.20."""

from __future__ import annotations

import time
from dataclasses import replace
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
from lmcache.core.errors import ConfigError
from lmcache.core.wall import TOLERATED, Wall, guarded, nothing

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lmcache.adapters.sglang.metadata import LoadMetadata, StoreMetadata
    from lmcache.adapters.sglang.scheduler import Found


class LMCacheMPConnector(Wall):
    """One rank, as an engine of its own at the server."""

    def __init__(  # noqa: PLR0913  (SGLang's)
        self,
        *,
        sgl_config: Any,
        tp_size: int,
        rank: int,
        page_size: int,
        k_pool: Sequence[torch.Tensor],
        v_pool: Sequence[torch.Tensor],
        host: str,
        port: int,
        tp_group: Any = None,
        config_file: str | None = None,
    ) -> None:
        """Raises `LMCacheError` for what cannot be cached, or cannot be configured so."""
        server_args = server_args_of()
        check_server(server_args)
        file = config_file or getattr(server_args, "lmcache_config_file", None)
        settings = replace(load_settings(file), mp_host=host, mp_port=port)
        self._ranks = Ranks(tp_size, tp_group, k_pool[0].device)
        self._cache = Joined(
            sgl_config,
            settings,
            (k_pool, v_pool),
            parallel=f"tp{rank}of{tp_size}",
            ranks=tp_size,
        )
        self._found: dict[str, tuple[Found, int, float]] = {}
        """What is leased for a request, up to which token, and since when."""
        self._lease_s = float(settings.config.pin_timeout_sec)
        if self.chunk_size() % page_size:
            self.close()
            raise ConfigError(
                f"the server's chunks of {self.chunk_size()} tokens are not whole pages of "
                f"{page_size} (--page-size)"
            )

    def chunk_size(self) -> int:
        """Tokens of a chunk, as the server has them."""
        return self._cache.scheduler.chunk_tokens

    def lookup_kv(self, token_ids: Sequence[int], request_id: str) -> int:
        """How many tokens of a prompt every rank can load; they are leased until it is told more.

        Asked again for a request it takes the place of what was found before.
        """
        self.release_pending(request_id)
        found = None
        try:
            if request_id and self.errors < TOLERATED:
                found = self._cache.scheduler.find(request_id, token_ids)
        except Exception:
            self.count_error("lookup_kv")
        tokens = self._ranks.least(found.tokens if found else 0)
        if found and not tokens:
            self._cache.scheduler.release(found)
        elif found:
            self._found[request_id] = found, tokens, time.monotonic()
        return tokens

    @guarded(nothing)
    def release_pending(self, request_id: str) -> None:
        """What was found for a request will not be loaded; nor for those that never came back."""
        too_old = time.monotonic() - self._lease_s
        stale = [name for name, (_, _, since) in self._found.items() if since < too_old]
        for name in {request_id, *stale} & self._found.keys():
            self._cache.scheduler.release(self._found.pop(name)[0])

    def retrieve_kv(self, load_metadata: LoadMetadata) -> int:
        """Load what was found for a request, but for what SGLang has itself.

        Returns how many tokens are there from `offset` on; 0 if any rank has not got all of them,
        and then nothing is written any more.
        """
        stop = 0
        try:
            stop = self._retrieve(load_metadata)
        except Exception:
            self.count_error("retrieve_kv")
        stop = self._ranks.least(stop)
        return stop - load_metadata.offset if stop else 0

    @guarded(nothing)
    def store_kv(self, store_metadata: StoreMetadata) -> None:
        """Store what is not stored yet of a request that has ended.

        Its last token may still be computed, so no chunk that ends with it is complete.
        """
        self._cache.store(store_metadata.token_ids[:-1], slots_of(store_metadata.kv_indices))

    def end_session(self, request_id: str) -> None:
        """The request has ended, or was never known."""
        self.release_pending(request_id)

    def reset(self) -> None:
        """The server's chunks are not this engine's to drop."""
        for request_id in list(self._found):
            self.release_pending(request_id)

    def close(self) -> None:
        """Let go of everything; again does nothing."""
        self.reset()
        self._cache.close()

    # ----

    def _retrieve(self, load_metadata: LoadMetadata) -> int:
        """Up to which token all is there; 0 if not."""
        found, tokens, _ = self._found.pop(load_metadata.request_id, (None, 0, 0.0))
        if found is None:
            return 0
        slots = slots_of(load_metadata.slot_mapping)[:tokens]
        absent = absent_in(slots)
        if absent >= tokens or len(slots) < tokens:
            self._cache.scheduler.release(found)
            return 0
        return tokens if self._cache.load(found, slots, absent) else 0
