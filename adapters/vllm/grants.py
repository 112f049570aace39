"""A worker of vLLM's pages: what they are, before anything is granted for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import vllm

from lmcache.adapters.vllm.exchange import Pages, exchange_pages
from lmcache.adapters.vllm.groups import groups_of
from lmcache.adapters.vllm.translate import (
    backends_of,
    check_parallel,
    distinct,
    layout_of,
    page_axis,
    slice_of,
    version_of,
)
from lmcache.core.errors import LayoutError
from lmcache.core.grants import Grants
from lmcache.core.selfcheck import check_layout

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

WHO_HAS_GROUPS = "they need LMCacheMPConnector and vLLM 0.30 or later"


class VllmGrants(Grants):
    """Learns its layout from what vLLM registers."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: object,
        *,
        may_have_groups: bool,
        lends: bool,
        exchanged: bool,
        deadline_s: float,
    ) -> None:
        """The parameters are those of `WorkerSide`."""
        super().__init__(lends=lends, deadline_s=deadline_s)
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._may_have_groups = may_have_groups
        self._exchanged = exchanged
        self.keeps_all = True
        """Whether each page is for itself: see `Groups`."""

    def register(self, kv_caches: dict[str, torch.Tensor]) -> dict[str, int]:
        """Learn the layout and begin to wait; the region of each layer.

        Raises `LMCacheError` for pages that cannot be cached.
        """
        check_parallel(self._vllm_config)
        self.lend(list(kv_caches.values()))
        backends = backends_of(self._vllm_config, kv_caches)
        groups = groups_of(self._kv_cache_config)
        if not groups.keep_all and not self._may_have_groups:
            raise LayoutError(f"cache groups ({groups}): {WHO_HAS_GROUPS}")
        version = version_of(vllm.__version__)
        axes = {n: page_axis(version, backends[n], t.dim()) for n, t in kv_caches.items()}
        self.keeps_all = groups.keep_all
        if self._exchanged:
            self._open(exchange_pages(self._vllm_config, self._kv_cache_config, kv_caches, axes))
            return {}
        layout = layout_of(kv_caches, backends, self._kv_cache_config, groups, vllm.__version__)
        tensors, regions = distinct(kv_caches)
        self._open(Pages(layout, list(tensors.values()), [axes[name] for name in tensors]))
        return regions

    def _open(self, pages: Pages) -> None:
        check_layout(*pages)
        transfer: Any = self._vllm_config.kv_transfer_config
        self.open(
            transfer.engine_id,
            self._vllm_config.parallel_config.rank,
            pages.layout,
            pages.tensors,
            slice_index=slice_of(self._vllm_config),
            places=pages.places,
        )
