"""Loads that the batch at hand waits for: before its forward pass, or layer by layer."""

from __future__ import annotations

import time
from concurrent.futures import wait
from functools import partial
from typing import TYPE_CHECKING

from lmcache.adapters.vllm.step import Step
from lmcache.core.log import init_logger
from lmcache.core.mover import pages_of
from lmcache.core.pool import DaemonPool

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from lmcache.adapters.vllm.step import Copy
    from lmcache.core.kernels.staging import Event
    from lmcache.core.lender import Lender
    from lmcache.core.mover import Move, Mover

logger = init_logger(__name__)


class BatchLoads:
    """The loads of one step at a time, region by region."""

    def __init__(self, lose: Callable[[list[int]], None]) -> None:
        """`lose` is told of the pages that were left without their content."""
        self._lose = lose
        self._step = Step()
        self._mover: Mover | Lender | None = None
        self._open: list[int] = []
        """Regions whose pages are still without their content."""
        self._ahead: dict[int, Future[None]] = {}
        """What is being made while the layers before compute."""
        self._missed: dict[int, list[Move]] = {}
        """Of those that have been made."""
        self._pool = DaemonPool(1, "lmcache-layers")

    def begin(self, step: Step, mover: Mover | Lender) -> None:
        """These loads are to be made; `end` must be called."""
        self._step, self._mover = step, mover
        self._open = list(range(len(mover.layout.regions)))

    def whole(self) -> None:
        """Make them now."""
        assert self._mover
        self._open.clear()
        after = self._mover.mark()
        for copy in self._step.loads:
            self._lose(load_copy(self._mover, copy, after))

    def ahead(self) -> None:
        """Make them while the engine goes on, if it can, one region after the other."""
        assert self._mover
        after = self._mover.mark()
        if after is None:
            return
        load = partial(self._load_ahead, self._mover, self._step.all_loads(), after)
        for region in self._open:
            self._ahead[region] = self._pool.submit(load, region)

    def layer(self, region: int | None) -> None:
        """This region is about to be read."""
        if region in self._open:
            self._finish(region)

    def end(self) -> None:
        """Make what no layer asked for. However it ends, no page is being filled any more."""
        try:
            for region in list(self._open):
                self._finish(region)
        finally:
            self.leave()

    def leave(self) -> None:
        """Make no more; returns when none is under way."""
        for load in self._ahead.values():
            load.cancel()
        wait(self._ahead.values())
        self._ahead.clear()
        self._missed.clear()
        self._open.clear()
        self._step, self._mover = Step(), None

    def close(self) -> None:
        """End the thread."""
        self.leave()
        self._pool.close()
        self._pool.join()

    # ----

    def _load_ahead(
        self, mover: Mover | Lender, moves: list[Move], after: Event, region: int
    ) -> None:
        _, self._missed[region] = mover.load(moves, region, after)

    def _finish(self, region: int) -> None:
        assert self._mover
        self._open.remove(region)
        ahead, failed = self._ahead.pop(region, None), self._step.all_loads()
        try:
            if ahead:
                ahead.result()
                failed = self._missed[region]
            else:
                _, failed = self._mover.load(failed, region, self._mover.mark())
        finally:
            self._lose(pages_of(failed))  # all of them, if the load raised


def load_copy(mover: Mover | Lender, copy: Copy, after: Event | None) -> list[int]:
    """Fill the pages of one request; those that could not be."""
    started = time.perf_counter()
    size, failed = mover.load(copy.moves, None, after)
    spent = time.perf_counter() - started
    if failed:
        logger.warning("Reqid: %s, %d loads failed", copy.request_id, len(failed))
        return pages_of(failed)
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
