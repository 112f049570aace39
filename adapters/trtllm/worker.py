"""Where the pages are: every rank of TensorRT-LLM.

On its executor's thread, but for stores and for loads outside the batch.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from lmcache.adapters.trtllm.outside import OutsideLoads
from lmcache.adapters.trtllm.stores import Copy, Stores
from lmcache.core.errors import LayoutError
from lmcache.core.grants import Grants
from lmcache.core.log import init_logger, log_copies
from lmcache.core.selfcheck import check_layout

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

    import torch

    from lmcache.adapters.trtllm.asking import Answerer
    from lmcache.adapters.trtllm.step import Step
    from lmcache.core.grants import Granted
    from lmcache.core.kernels.staging import Event
    from lmcache.core.layout import PageLayout
    from lmcache.core.mover import Move

logger = init_logger(__name__)

DEVICES = ("cuda", "cpu")
PROMISE_S = 30.0
"""How long what was promised can be loaded from a cache whose process has died."""


class Worker:
    """Copies blocks as each step says."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._stores = Stores()
        self._outside = OutsideLoads()
        self._grants = Grants(keeps_s=PROMISE_S, is_owed=lambda: self._outside.is_busy)
        self._is_idle = True
        """Whether no pass was begun since it was last asked what has ended."""
        self._answerer: Answerer | None = None
        self._device: torch.device | None = None
        self._step: Step | None = None
        """The one whose pass is under way."""
        self._now: Granted | None = None
        """For that step; None if the slab it was planned for is not mapped."""

    def open(
        self,
        engine_id: str,
        answerer: Answerer,
        layout: PageLayout,
        tensors: Sequence[torch.Tensor],
    ) -> None:
        """Begin to wait for a scheduling side. Raises `LayoutError` if a copy would be wrong."""
        self._stores.start()
        answerer.start(self._stores.copy)
        self._answerer = answerer
        self._device = tensors[0].device
        if self._device.type not in DEVICES:
            raise LayoutError(f"blocks on a {self._device.type} device cannot be stored meanwhile")
        check_layout(layout, tensors, [0] * len(tensors))
        self._grants.open(engine_id, self._rank, layout, tensors, slice_index=self._rank)

    def begin(self, step: Step | None, stream: Any) -> None:
        """Load what a step says, before its pass and after all that `stream` is to do.

        Loads outside the batch are only begun; `loaded` tells of them. Raises `RuntimeError` for
        what cannot be loaded: TensorRT-LLM counts on it, and would answer from what is not there.
        """
        self.finish(None)
        self._is_idle = False
        self._grants.take_back()
        if step is None:
            return
        self._stores.drop(step.gone)
        self._step, self._now = step, self._grants.current(step.attachment)
        if self._now and step.number:
            parts = 1 + len(step.stores) + len(step.outside)
            self._now.progress.begin(step.number, parts)
        if step.broken:
            raise RuntimeError(step.broken)
        self._outside.excuse(step.excused)
        for request_id, attachment, moves in step.outside:
            granted, after = self._holder(attachment), stream.record_event()
            load = partial(self._load_outside, granted, moves, after, self._now, step.number)
            self._outside.submit(request_id, load)
        if step.loads:
            self._follow(stream)
            self._load(step)

    def finish(self, stream: Any) -> None:
        """The pass is on `stream`; None if it failed. What it computes is stored later.

        What passes before it have computed of its requests is stored now, as they have their
        blocks: on return, it is.
        """
        step, now = self._step, self._now
        self._step = self._now = None
        if step is None:
            return
        left = 1 + len(step.stores)
        try:
            if stream is not None:
                self._stores.settle(step.running)
            # whatever is left of these is from before they began anew
            self._stores.drop([*step.running, *(request_id for request_id, _ in step.stores)])
            if stream is not None and now and step.number:
                for request_id, moves in step.stores:
                    self._store(request_id, moves, now, step.number, stream)
                    left -= 1
        finally:
            if now and step.number:
                for _ in range(left):
                    now.progress.end(step.number)
            assert self._answerer, "there are no steps before pools"
            self._answerer.note(step.pass_number)

    def stored(self, named: Iterable[int]) -> list[int]:
        """The requests, of those that are or were named, whose blocks may go once settled."""
        return self._stores.take_ended(named, is_idle=self._is_idle)

    def settle(self, ended: Container[int]) -> None:
        """What was stored of requests that have their blocks counts."""
        self._stores.settle(ended)

    def loaded(self, named: Iterable[int]) -> list[int]:
        """The requests, of those that are or were named, whose loads outside the batch are over.

        Raises `RuntimeError` if one has failed, for the reason that `begin` does.
        """
        ended = self._outside.take_ended(named, is_idle=self._is_idle)
        self._is_idle = True
        return ended

    def close(self) -> None:
        """Stop listening, and unmap the slab."""
        self._step = self._now = None
        self._outside.stop()
        self._grants.leave()
        self._outside.join()
        if self._answerer:
            self._answerer.stop()
        self._stores.close()
        if self._answerer:
            self._answerer.join()
        self._grants.close()

    # ----

    def _load(self, step: Step) -> None:
        started, size, tokens = time.perf_counter(), 0, 0
        for attachment, moves in step.loads:
            granted = self._holder(attachment)
            size += _load_all(granted, moves, granted.mover.mark())
            tokens += self._tokens(moves)
        log_copies(logger, f"Retrieved {tokens} tokens", size, time.perf_counter() - started)

    def _load_outside(
        self, holder: Granted, moves: list[Move], after: Event, now: Granted | None, number: int
    ) -> None:
        """Load, on a thread, as a part of step `number` of `now`."""
        try:
            if self._is_on_host:
                after.synchronize()
            started = time.perf_counter()
            size = _load_all(holder, moves, None if self._is_on_host else after)
            what = f"Retrieved {self._tokens(moves)} tokens outside the batch"
            log_copies(logger, what, size, time.perf_counter() - started)
        finally:
            if now and number:
                now.progress.end(number)

    def _holder(self, attachment: int) -> Granted:
        """Who has what this attachment promised."""
        granted = self._grants.current(attachment) or self._grants.kept(attachment)
        if granted is None:
            raise RuntimeError("the cache is gone with blocks that TensorRT-LLM was promised")
        return granted

    def _follow(self, stream: Any) -> None:
        """Have the loads that follow wait for what is queued on `stream`."""
        if self._is_on_host:
            stream.synchronize()
            return
        import torch

        torch.get_device_module(self._device).current_stream(self._device).wait_stream(stream)

    def _store(
        self, request_id: int, moves: list[Move], now: Granted, number: int, stream: Any
    ) -> None:
        after, tokens = stream.record_event(), self._tokens(moves)
        copy = Copy(request_id, moves, now, number, tokens, after, waits=self._is_on_host)
        self._stores.add(copy)

    @property
    def _is_on_host(self) -> bool:
        return self._device is not None and self._device.type == "cpu"

    def _tokens(self, moves: Sequence[Move]) -> int:
        assert self._grants.layout
        return sum(len(move.engine_pages) for move in moves) * self._grants.layout.page_tokens


def _load_all(granted: Granted, moves: list[Move], after: Event | None) -> int:
    size, failed = granted.mover.load(moves, None, after)
    if failed:
        raise RuntimeError(f"{len(failed)} chunks that were promised cannot be loaded")
    return size
