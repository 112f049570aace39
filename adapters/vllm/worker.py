"""Where the pages are: every worker of vLLM. Runs on the worker's main thread."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import vllm

from lmcache.adapters.vllm.groups import groups_of
from lmcache.adapters.vllm.outside import OutsideLoads, Progress
from lmcache.adapters.vllm.step import Copy, Step, StoredEvent
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
from lmcache.core.handover import Door, Grant, Hello, Lending, address_of
from lmcache.core.lender import Lender
from lmcache.core.lent_memory import LentMemory
from lmcache.core.log import init_logger
from lmcache.core.mover import Move, Mover
from lmcache.core.selfcheck import check_layout
from lmcache.core.slab import Slab

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from vllm.config import VllmConfig

    from lmcache.core.layout import PageLayout

logger = init_logger(__name__)

WHO_HAS_GROUPS = "they need LMCacheMPConnector and vLLM 0.30 or later"


class Granted(NamedTuple):
    """What one attachment gave us."""

    attachment: int
    mover: Mover | Lender
    progress: Progress


class WorkerSide:
    """Copies pages as each step says, and reports the pages it could not fill."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: object,
        *,
        layerwise: bool = False,
        outside: bool = False,
        may_have_groups: bool = False,
        lends: bool = False,
        deadline_s: float = 1.0,
    ) -> None:
        """With `outside`, loads are made while the batch goes on, and `take_received` tells.

        With `may_have_groups`, vLLM asks which requests failed, not only for pages.

        With `lends`, another process makes the copies, each of which may take `deadline_s` and what
        its bytes take besides.
        """
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._layerwise = layerwise
        self._may_have_groups = may_have_groups
        self._layout: PageLayout | None = None
        self._tensors: list[torch.Tensor] = []
        self._regions: dict[str, int] = {}
        self._lends = lends
        self._deadline_s = deadline_s
        self._memory: LentMemory | None = None
        self._lender: Lender | None = None
        """The latest, whose pages may have to be taken back."""
        self._door: Door | None = None
        self._granted: Granted | None = None
        """By the latest attachment, on the door's thread."""
        self._retired: list[Mover | Lender] = []
        """Movers of attachments that ended, to be closed where they are used."""
        self._outside = OutsideLoads(self._load_copy) if outside else None
        self._now: Granted | None = None
        """For the step at hand; None if the slab it was planned for is not mapped."""
        self._step = Step()
        self._loaded: set[int] = set()
        self._stored: set[int] = set()
        self._failed: set[int] = set()
        self._tainted = 0
        """Steps, this one included, that may compute from pages a load left without content."""
        self._in_flight = vllm_config.parallel_config.pipeline_parallel_size + bool(
            vllm_config.scheduler_config.async_scheduling
        )
        """Steps that vLLM may have scheduled before it hears of a failed load."""
        self._events: list[StoredEvent] = []

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Learn the layout and wait, on another thread, for the scheduling side."""
        check_parallel(self._vllm_config)
        if self._lends:
            self._memory = LentMemory(kv_caches.values())
        backends = backends_of(self._vllm_config, kv_caches)
        groups = groups_of(self._kv_cache_config)
        if not groups.keep_all and not self._may_have_groups:
            raise LayoutError(f"cache groups ({groups}): {WHO_HAS_GROUPS}")
        layout = layout_of(kv_caches, backends, self._kv_cache_config, groups, vllm.__version__)
        tensors, self._regions = distinct(kv_caches)
        version = version_of(vllm.__version__)
        axes = [page_axis(version, backends[name], t.dim()) for name, t in tensors.items()]
        self._tensors = list(tensors.values())
        check_layout(layout, self._tensors, axes)
        self._layout = layout
        if self._outside:
            self._outside.by_request = not groups.keep_all
        rank = self._vllm_config.parallel_config.rank
        hello = Hello(
            number=rank,
            page_tokens=layout.page_tokens,
            page_bytes=layout.stored_bytes,
            fingerprint=layout.fingerprint,
            slice_index=slice_of(self._vllm_config),
            pid=os.getpid(),
            lends=self._lending(layout),
        )
        transfer: Any = self._vllm_config.kv_transfer_config
        address = address_of(transfer.engine_id, rank)
        lent = self._memory.fds if self._memory else None
        self._door = Door(address, hello, self._attach, self._detach, lent)
        logger.info(
            "Registered %d pages of %d tokens, %d bytes each, %s (layout %s)",
            layout.num_pages,
            layout.page_tokens,
            layout.page_bytes,
            layout.kind,
            layout.fingerprint[:12],
        )

    def _lending(self, layout: PageLayout) -> Lending | None:
        if not self._memory:
            return None
        spans = [(span.address, span.length) for span in self._memory.spans]
        return Lending(layout=layout, spans=spans)

    def _attach(self, grant: Grant, fds: list[int]) -> None:
        """Map the slab, or ask for copies. Called on the door's thread."""
        mover = self._lender_for(fds) if self._lends else self._mover_for(grant, fds[0])
        self._granted = Granted(grant.attachment, mover, Progress(mover.finish))

    def _mover_for(self, grant: Grant, fd: int) -> Mover:
        assert self._layout is not None, "the door opens after the layout is known"
        geometry = Geometry(
            page_tokens=self._layout.page_tokens,
            pages_per_chunk=grant.pages_per_chunk,
            slices=grant.slices,
            layout=grant.layout,
        )
        return Mover(
            self._layout,
            geometry,
            Slab(fd, grant.slab_bytes),
            number=grant.word,
            slice_index=slice_of(self._vllm_config),
            writes=grant.writes,
            tensors=self._tensors,
        )

    def _lender_for(self, channels: list[int]) -> Lender:
        assert self._layout
        assert self._memory
        assert self._door
        self._lender = Lender(
            self._layout,
            channels,
            self._deadline_s,
            take_back=self._memory.take_back,
            given_up=self._door.hang_up,
        )
        return self._lender

    def _detach(self) -> None:
        """Leave the slab alone. Called on the door's thread."""
        granted, self._granted = self._granted, None
        if granted:
            granted.mover.retire()
            self._retired.append(granted.mover)

    # ---- one step of vLLM

    def begin(self, step: Step) -> None:
        """A step was bound. Where vLLM starts loads after the forward pass, layers store before."""
        if self._lender:
            self._lender.take_back()
        while self._retired:
            self._retired.pop().close()
        self._step = step
        self._now, granted = None, self._granted
        if granted and granted.attachment == step.attachment:
            self._now = granted
        self._loaded.clear()
        self._stored.clear()
        self._begin_answer(step)
        self._lose(step.lost, step.unloaded)

    def start_load(self, step: Step, *, by_layer: bool) -> None:
        """Fill pages before the forward pass; with `by_layer`, leave them to `load_layer`."""
        if step is not self._step:
            self.begin(step)
        if not step.loads:
            return
        if self._now is None:
            self.give_up(step)
        elif self._outside:
            self._outside.submit(step, self._now.mover, self._now.progress)
        elif not (self._layerwise and by_layer):
            self._load(self._now.mover)

    def load_layer(self, name: str) -> None:
        """Fill one layer's share of the pages, before its attention."""
        region = self._regions.get(name)
        if self._layerwise and self._now and region in self._unloaded():
            self._load_region(self._now.mover, region)

    def store_layer(self, name: str) -> None:
        """Store one layer's share of the pages, after its attention."""
        region = self._regions.get(name)
        if self._layerwise and self._step.stores and self._now and region is not None:
            if region not in self._stored:
                self._now.mover.store(self._step.all_stores(), region)
            self._stored.add(region)

    def finish(self) -> None:
        """Copy what no layer asked for, and tell the scheduling side that all copies are done.

        Nothing is stored that may have been computed from pages without their content.
        """
        now, step = self._now, self._step
        try:
            if now:
                for region in self._unloaded():
                    self._load_region(now.mover, region)
                for copy in step.stores if not self._tainted else ():
                    self._store(now.mover, copy)
        finally:
            if now and step.number and self._answers_here(step):
                if self._tainted:
                    now.mover.spoil(step.number)
                now.progress.end(step.number)
            self._step, self._now = Step(), None
            self._tainted = max(0, self._tainted - 1)

    def give_up(self, step: Step) -> None:
        """An error left the loads of a step in an unknown state: report all their pages."""
        self._lose(step.lost, step.unloaded)
        pages = [page for move in step.all_loads() for page in move.engine_pages]
        self._lose(pages, [copy.request_id for copy in step.loads])
        if self._outside and self._now and step.number:
            for _ in step.loads:
                self._now.progress.end(step.number)

    def close(self) -> None:
        """Stop listening, and unmap the slab."""
        if self._door:
            self._door.close()
        if self._outside:
            self._outside.close()
        self._now = None
        self._detach()
        while self._retired:
            self._retired.pop().close()

    def take_events(self) -> list[StoredEvent]:
        """What was stored since the last call, if events are wanted."""
        events, self._events = self._events, []
        return events

    def take_failed_pages(self) -> set[int]:
        """Pages that loads left without their content since the last call."""
        failed, self._failed = self._failed, set()
        return failed | self._outside.take_failed_pages() if self._outside else failed

    def take_received(self) -> set[str]:
        """Requests whose loads outside the batch have ended since the last call, well or not.

        Of those that did not end well, `take_failed_pages` has the pages from now on, or
        `take_failed_requests` the names where pages are not for themselves.
        """
        return self._outside.take_received() if self._outside else set()

    def take_failed_requests(self) -> set[str]:
        """Requests that did not get what they waited for, where all of it is needed."""
        return self._outside.take_failed_requests() if self._outside else set()

    # ----

    def _answers_here(self, step: Step) -> bool:
        """Whether a part of a step is done on this thread, so that `finish` ends it."""
        return bool(step.stores) or not self._outside

    def _begin_answer(self, step: Step) -> None:
        """Expect as many ends of a step as it has parts that go their own ways."""
        if self._now and step.number:
            loads = len(step.loads) if self._outside else 0
            self._now.progress.begin(step.number, loads + self._answers_here(step))

    def _unloaded(self) -> list[int]:
        """Regions whose share of the step's loads is still to be copied."""
        if not self._step.loads or self._now is None or self._outside:
            return []
        assert self._layout is not None
        return [i for i in range(len(self._layout.regions)) if i not in self._loaded]

    def _give_up(self, moves: list[Move]) -> None:
        self._lose([page for move in moves for page in move.engine_pages])

    def _lose(self, pages: list[int], requests: Sequence[str] = ()) -> None:
        """Pages without their content, and the requests that wait for them outside the batch."""
        if self._outside:  # nothing has been computed from them
            self._outside.refuse(list(requests), pages)
        elif pages:
            self._failed.update(pages)
            self._tainted = self._in_flight

    def _load_region(self, mover: Mover | Lender, region: int) -> None:
        self._loaded.add(region)
        failed = self._step.all_loads()
        try:
            _, failed = mover.load(failed, region)
        finally:
            self._give_up(failed)  # all of them, if the load raised

    def _load(self, mover: Mover | Lender) -> None:
        self._loaded.update(self._unloaded())
        for copy in self._step.loads:
            self._lose(self._load_copy(mover, copy))

    def _load_copy(self, mover: Mover | Lender, copy: Copy) -> list[int]:
        """Fill the pages of one request; those that could not be."""
        started = time.perf_counter()
        size, failed = mover.load(copy.moves)
        spent = time.perf_counter() - started
        if failed:
            logger.warning("Reqid: %s, %d loads failed", copy.request_id, len(failed))
            return [page for move in failed for page in move.engine_pages]
        logger.info(
            "Retrieved %d out of %d required tokens (from %d total tokens). "
            "size: %.4f gb, cost %.4f ms, throughput: %.4f GB/s;",
            copy.tokens,
            copy.required,
            copy.total,
            size / 1e9,
            spent * 1e3,
            size / 1e9 / max(spent, 1e-9),
        )
        return []

    def _store(self, mover: Mover | Lender, copy: Copy) -> None:
        started = time.perf_counter()
        size = 0
        for region in self._unstored():
            size += mover.store(copy.moves, region)
        copied = time.perf_counter()
        mover.publish(copy.moves)
        self._events.extend(copy.events)
        spent = time.perf_counter() - started
        if not size and not self._stored:  # another rank's to store, or the slab has been left
            return
        logger.info(
            "Stored %d out of total %d tokens. size: %.4f gb, cost %.4f ms, "
            "throughput: %.4f GB/s; offload_time: %.4f ms, put_time: %.4f ms",
            copy.tokens,
            copy.required,
            size / 1e9,
            spent * 1e3,
            size / 1e9 / max(spent, 1e-9),
            (copied - started) * 1e3,
            (spent - copied + started) * 1e3,
        )

    def _unstored(self) -> list[int | None]:
        if not self._stored:
            return [None]
        assert self._layout is not None
        return [i for i in range(len(self._layout.regions)) if i not in self._stored]
