"""Where the pages are: every worker of vLLM. Runs on the worker's main thread."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import vllm

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
from lmcache.core.geometry import Geometry
from lmcache.core.handover import Door, Grant, Hello, address_of
from lmcache.core.log import init_logger
from lmcache.core.mover import Move, Mover
from lmcache.core.selfcheck import check_layout
from lmcache.core.slab import Slab

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

    from lmcache.core.layout import PageLayout

logger = init_logger(__name__)


class Granted(NamedTuple):
    """What one attachment gave us."""

    attachment: int
    mover: Mover


class WorkerSide:
    """Copies pages as each step says, and reports the pages it could not fill."""

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: object, *, layerwise: bool
    ) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._layerwise = layerwise
        self._layout: PageLayout | None = None
        self._tensors: list[torch.Tensor] = []
        self._regions: dict[str, int] = {}
        self._door: Door | None = None
        self._granted: Granted | None = None
        """By the latest attachment, on the door's thread."""
        self._retired: list[Mover] = []
        """Movers of attachments that ended, perhaps still copying when the next one began."""
        self._mover: Mover | None = None
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
        backends = backends_of(self._vllm_config, kv_caches)
        layout = layout_of(kv_caches, backends, self._kv_cache_config, vllm.__version__)
        tensors, self._regions = distinct(kv_caches)
        version = version_of(vllm.__version__)
        axes = [page_axis(version, backends[name], t.dim()) for name, t in tensors.items()]
        self._tensors = list(tensors.values())
        check_layout(layout, self._tensors, axes)
        self._layout = layout
        rank = self._vllm_config.parallel_config.rank
        hello = Hello(
            number=rank,
            page_tokens=layout.page_tokens,
            page_bytes=layout.page_bytes,
            fingerprint=layout.fingerprint,
            slice_index=slice_of(self._vllm_config),
            pid=os.getpid(),
        )
        transfer: Any = self._vllm_config.kv_transfer_config
        self._door = Door(address_of(transfer.engine_id, rank), hello, self._attach)
        logger.info(
            "Registered %d pages of %d tokens, %d bytes each, %s (layout %s)",
            layout.num_pages,
            layout.page_tokens,
            layout.page_bytes,
            layout.kind,
            layout.fingerprint[:12],
        )

    def _attach(self, grant: Grant, fd: int) -> None:
        """Map the slab. Called on the door's thread."""
        assert self._layout is not None, "the door opens after the layout is known"
        geometry = Geometry(
            page_tokens=self._layout.page_tokens,
            pages_per_chunk=grant.pages_per_chunk,
            slices=grant.slices,
            layout=grant.layout,
        )
        mover = Mover(
            self._layout,
            geometry,
            Slab(fd, grant.slab_bytes),
            number=grant.word,
            slice_index=slice_of(self._vllm_config),
            writes=grant.writes,
            tensors=self._tensors,
        )
        earlier, self._granted = self._granted, Granted(grant.attachment, mover)
        if earlier is not None:
            self._retired.append(earlier.mover)

    # ---- one step of vLLM

    def begin(self, step: Step) -> None:
        """A step was bound. Where vLLM starts loads after the forward pass, layers store before."""
        while self._retired:
            self._retired.pop().close()
        self._step = step
        self._mover, granted = None, self._granted
        if granted and granted.attachment == step.attachment:
            self._mover = granted.mover
        self._loaded.clear()
        self._stored.clear()
        self._lose(step.lost)

    def start_load(self, step: Step, *, by_layer: bool) -> None:
        """Fill pages before the forward pass; with `by_layer`, leave them to `load_layer`."""
        if step is not self._step:
            self.begin(step)
        if not step.loads:
            return
        if self._mover is None:
            self.give_up(step)
        elif not (self._layerwise and by_layer):
            self._load()

    def load_layer(self, name: str) -> None:
        """Fill one layer's share of the pages, before its attention."""
        region = self._regions.get(name)
        if self._layerwise and region in self._unloaded():
            self._load_region(region)

    def store_layer(self, name: str) -> None:
        """Store one layer's share of the pages, after its attention."""
        region = self._regions.get(name)
        if self._layerwise and self._step.stores and self._mover and region is not None:
            if region not in self._stored:
                self._mover.store(self._step.all_stores(), region)
            self._stored.add(region)

    def finish(self) -> None:
        """Copy what no layer asked for, and tell the scheduling side that all copies are done.

        Nothing is stored that may have been computed from pages without their content.
        """
        try:
            if self._mover is not None:
                for region in self._unloaded():
                    self._load_region(region)
                for copy in self._step.stores if not self._tainted else ():
                    self._store(copy)
        finally:
            if self._mover is not None and self._step.number:
                if self._tainted:
                    self._mover.spoil(self._step.number)
                self._mover.finish(self._step.number)
            self._step, self._mover = Step(), None
            self._tainted = max(0, self._tainted - 1)

    def give_up(self, step: Step) -> None:
        """An error left the loads of a step in an unknown state: report all their pages."""
        self._lose(step.lost)
        self._give_up(step.all_loads())

    def close(self) -> None:
        """Stop listening, and unmap the slab."""
        if self._door:
            self._door.close()
        self._mover = None
        if self._granted:
            self._retired.append(self._granted.mover)
            self._granted = None
        while self._retired:
            self._retired.pop().close()

    def take_events(self) -> list[StoredEvent]:
        """What was stored since the last call, if events are wanted."""
        events, self._events = self._events, []
        return events

    def take_failed_pages(self) -> set[int]:
        """Pages that loads left without their content since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    # ----

    def _unloaded(self) -> list[int]:
        """Regions whose share of the step's loads is still to be copied."""
        if not self._step.loads or self._mover is None:
            return []
        assert self._layout is not None
        return [i for i in range(len(self._layout.regions)) if i not in self._loaded]

    def _give_up(self, moves: list[Move]) -> None:
        self._lose([page for move in moves for page in move.pages])

    def _lose(self, pages: list[int]) -> None:
        if pages:
            self._failed.update(pages)
            self._tainted = self._in_flight

    def _load_region(self, region: int) -> None:
        assert self._mover is not None
        self._loaded.add(region)
        failed = self._step.all_loads()
        try:
            _, failed = self._mover.load(failed, region)
        finally:
            self._give_up(failed)  # all of them, if the load raised

    def _load(self) -> None:
        assert self._mover is not None
        self._loaded.update(self._unloaded())
        for copy in self._step.loads:
            started = time.perf_counter()
            size, failed = self._mover.load(copy.moves)
            spent = time.perf_counter() - started
            self._give_up(failed)
            if failed:
                logger.warning("Reqid: %s, %d loads failed", copy.request_id, len(failed))
                continue
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

    def _store(self, copy: Copy) -> None:
        assert self._mover is not None
        started = time.perf_counter()
        size = 0
        for region in self._unstored():
            size += self._mover.store(copy.moves, region)
        copied = time.perf_counter()
        self._mover.publish(copy.moves)
        self._events.extend(copy.events)
        spent = time.perf_counter() - started
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
