"""Where the pages are: every rank of TensorRT-LLM. Runs on the thread of its executor."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lmcache.adapters.trtllm.stores import Copy, Stores
from lmcache.core.grants import Grants
from lmcache.core.log import init_logger, log_copies
from lmcache.core.selfcheck import check_layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from lmcache.adapters.trtllm.step import Step
    from lmcache.core.grants import Granted
    from lmcache.core.kernels.staging import Event
    from lmcache.core.layout import PageLayout
    from lmcache.core.mover import Move

logger = init_logger(__name__)

PROMISE_S = 30.0
"""How long what was promised can be loaded from a cache whose process has died."""


class Worker:
    """Copies blocks as each step says."""

    def __init__(self) -> None:
        self._grants = Grants(keeps_s=PROMISE_S)
        self._stores = Stores()
        self._device: torch.device | None = None
        self._step: Step | None = None
        """The one whose pass is under way."""
        self._now: Granted | None = None
        """For that step; None if the slab it was planned for is not mapped."""

    def open(
        self, engine_id: str, rank: int, layout: PageLayout, tensors: Sequence[torch.Tensor]
    ) -> None:
        """Begin to wait for a scheduling side. Raises `LayoutError` if a copy would be wrong."""
        check_layout(layout, tensors, [0] * len(tensors))
        self._device = tensors[0].device
        self._grants.open(engine_id, rank, layout, tensors, slice_index=rank)

    def begin(self, step: Step | None, stream: Any) -> None:
        """Load what a step says, before its pass and after all that `stream` is to do.

        Raises `RuntimeError` for what cannot be loaded: TensorRT-LLM counts on it, and would answer
        from what is not there.
        """
        self.finish(None)
        self._grants.take_back()
        if step is None:
            return
        self._stores.seen(step.running)
        self._stores.drop(step.gone)
        self._step, self._now = step, self._grants.current(step.attachment)
        if self._now and step.number:
            self._now.progress.begin(step.number, 1 + len(step.stores))
        if step.broken:
            raise RuntimeError(step.broken)
        if step.loads:
            self._follow(stream)
            self._load(step)

    def finish(self, stream: Any) -> None:
        """The pass is on `stream`: begin to store what its step says. None if it failed."""
        step, now = self._step, self._now
        self._step = self._now = None
        if step is None or now is None or not step.number:
            return
        left = len(step.stores)
        try:
            if stream is not None and step.stores:
                after = stream.record_event()
                for request_id, moves in step.stores:
                    self._stores.submit(self._copy(request_id, moves, now, step.number, after))
                    left -= 1
        finally:
            for _ in range(1 + left):
                now.progress.end(step.number)

    def take_stored(self, ended: Iterable[int]) -> list[int]:
        """Requests that have ended and of which nothing more is stored; each is named once.

        `ended` are those that have ended since the last call; their blocks are kept until then.
        """
        self._stores.keep(ended)
        return self._stores.take_done()

    def close(self) -> None:
        """Stop listening, and unmap the slab."""
        self._step = self._now = None
        self._grants.leave()
        self._stores.close()
        self._grants.close()

    # ----

    def _load(self, step: Step) -> None:
        started, size, tokens = time.perf_counter(), 0, 0
        for attachment, moves in step.loads:
            granted = self._grants.current(attachment) or self._grants.kept(attachment)
            if granted is None:
                raise RuntimeError("the cache is gone with blocks that TensorRT-LLM was promised")
            copied, failed = granted.mover.load(moves, None, granted.mover.mark())
            if failed:
                raise RuntimeError(f"{len(failed)} chunks that were promised cannot be loaded")
            size += copied
            tokens += self._tokens(moves)
        log_copies(logger, f"Retrieved {tokens} tokens", size, time.perf_counter() - started)

    def _follow(self, stream: Any) -> None:
        """Have the copies that follow wait for what is queued on `stream`."""
        if self._is_on_host:
            stream.synchronize()
            return
        import torch

        torch.get_device_module(self._device).current_stream(self._device).wait_stream(stream)

    def _copy(
        self, request_id: int, moves: list[Move], now: Granted, number: int, after: Event
    ) -> Copy:
        tokens = self._tokens(moves)
        return Copy(request_id, moves, now, number, tokens, after, waits=self._is_on_host)

    @property
    def _is_on_host(self) -> bool:
        return self._device is not None and self._device.type == "cpu"

    def _tokens(self, moves: Sequence[Move]) -> int:
        assert self._grants.layout
        return sum(len(move.engine_pages) for move in moves) * self._grants.layout.page_tokens
