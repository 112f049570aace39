"""A worker's pages, and what each attachment of a scheduling side grants for them."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import vllm

from lmcache.adapters.vllm.groups import groups_of
from lmcache.adapters.vllm.outside import Progress
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
from lmcache.core.geometry import Geometry
from lmcache.core.handover import Door, Grant, Hello, address_of
from lmcache.core.kernels.copier import copier_for
from lmcache.core.lender import Lender
from lmcache.core.lending import lendable
from lmcache.core.log import init_logger
from lmcache.core.mover import Mover
from lmcache.core.pool import DaemonPool
from lmcache.core.selfcheck import check_layout
from lmcache.core.slab import Slab

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

    from lmcache.core.layout import PageLayout
    from lmcache.core.lending import LentPages

logger = init_logger(__name__)

WHO_HAS_GROUPS = "they need LMCacheMPConnector and vLLM 0.30 or later"


class Granted(NamedTuple):
    """What one attachment gave us."""

    attachment: int
    mover: Mover | Lender
    progress: Progress


class Grants:
    """Waits, on a thread of its own, for whoever schedules. All else is for the main thread."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: object,
        *,
        may_have_groups: bool,
        lends: bool,
        deadline_s: float,
    ) -> None:
        """The parameters are those of `WorkerSide`."""
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._may_have_groups = may_have_groups
        self._lends = lends
        self._deadline_s = deadline_s
        self.layout: PageLayout | None = None
        self.keeps_all = True
        """Whether each page is for itself: see `Groups`."""
        self.latest: Granted | None = None
        """By the latest attachment, on the door's thread."""
        self._tensors: list[torch.Tensor] = []
        self._memory: LentPages | None = None
        self._lender: Lender | None = None
        """The latest, whose pages may have to be taken back."""
        self._door: Door | None = None
        self._closing = DaemonPool(1, "lmcache-closing")
        """Closes the movers of attachments that ended: pinned memory takes long to let go of."""

    def register(self, kv_caches: dict[str, torch.Tensor]) -> dict[str, int]:
        """Learn the layout and begin to wait; the region of each layer.

        Raises `LMCacheError` for pages that cannot be cached.
        """
        check_parallel(self._vllm_config)
        if self._lends:
            self._memory = lendable(list(kv_caches.values()))
        backends = backends_of(self._vllm_config, kv_caches)
        groups = groups_of(self._kv_cache_config)
        if not groups.keep_all and not self._may_have_groups:
            raise LayoutError(f"cache groups ({groups}): {WHO_HAS_GROUPS}")
        layout = layout_of(kv_caches, backends, self._kv_cache_config, groups, vllm.__version__)
        tensors, regions = distinct(kv_caches)
        version = version_of(vllm.__version__)
        axes = [page_axis(version, backends[name], t.dim()) for name, t in tensors.items()]
        self._tensors = list(tensors.values())
        check_layout(layout, self._tensors, axes)
        self.layout, self.keeps_all = layout, groups.keep_all
        self._door = self._open(layout)
        logger.info(
            "Registered %d pages of %d tokens, %d bytes each, %s (layout %s)",
            layout.num_pages,
            layout.page_tokens,
            layout.page_bytes,
            layout.kind,
            layout.fingerprint[:12],
        )
        return regions

    def current(self, attachment: int) -> Granted | None:
        """What this attachment granted, if it is the latest and has not ended."""
        granted = self.latest
        return granted if granted and granted.attachment == attachment else None

    def take_back(self) -> None:
        """Between two steps: leave a copier behind that is too slow."""
        if self._lender:
            self._lender.take_back()

    def leave(self) -> None:
        """Stop listening, and have every copy end: those under way at once, all others fail."""
        if self._door:
            self._door.close()
        self._detach()

    def close(self) -> None:
        """After `leave`: return when the slabs of attachments that have ended are unmapped."""
        self._closing.wait()
        self._closing.close()
        self._closing.join()

    # ----

    def _open(self, layout: PageLayout) -> Door:
        transfer: Any = self._vllm_config.kv_transfer_config
        rank = self._vllm_config.parallel_config.rank
        hello = Hello(
            number=rank,
            page_tokens=layout.page_tokens,
            page_bytes=layout.stored_bytes,
            summary=layout.summary,
            slice_index=slice_of(self._vllm_config),
            pid=os.getpid(),
        )
        address = address_of(transfer.engine_id, rank)
        lend = partial(self._memory.lend, layout) if self._memory else None
        return Door(address, hello, self._attach, self._detach, lend)

    def _attach(self, grant: Grant, fds: list[int]) -> None:
        """Map the slab, or ask for copies. Called on the door's thread."""
        mover = self._lender_for(fds) if self._lends else self._mover_for(grant, fds[0])
        self.latest = Granted(grant.attachment, mover, Progress(mover.finish))

    def _mover_for(self, grant: Grant, fd: int) -> Mover:
        assert self.layout is not None, "the door opens after the layout is known"
        geometry = Geometry(
            page_tokens=self.layout.page_tokens,
            pages_per_chunk=grant.pages_per_chunk,
            slices=grant.slices,
            layout=grant.layout,
        )
        slab = Slab(fd, grant.slab_bytes)
        try:
            return Mover(
                self.layout,
                geometry,
                slab,
                number=grant.word,
                slice_index=slice_of(self._vllm_config),
                writes=grant.writes,
                copier=copier_for(self.layout, slab, self._tensors),
            )
        except BaseException:
            slab.close()
            raise

    def _lender_for(self, channels: list[int]) -> Lender:
        assert self.layout
        assert self._memory
        assert self._door
        self._lender = Lender(
            self.layout,
            channels,
            self._deadline_s,
            memory=self._memory,
            given_up=self._door.hang_up,
        )
        return self._lender

    def _detach(self) -> None:
        """Leave the slab alone. Called on the door's thread."""
        granted, self.latest = self.latest, None
        if granted:
            granted.mover.retire()
            self._closing.submit(granted.mover.close)
