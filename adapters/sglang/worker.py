"""Where one rank's pages are: copies as the scheduler says."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lmcache.adapters.sglang.translate import layout_of, pools_of
from lmcache.core.grants import Grants
from lmcache.core.log import init_logger, log_copies
from lmcache.core.selfcheck import check_layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from lmcache.adapters.sglang.scheduler import Copies
    from lmcache.core.grants import Granted

logger = init_logger(__name__)

PER_LAYER = 2
"""Regions: keys and values."""


class Loading:
    """A load, layer after layer; its step ends when `end` is called."""

    def __init__(self, granted: Granted, copies: Copies, layers: int) -> None:
        self._granted = granted
        self._copies = copies
        self._layers = layers
        self.next = 0
        """The layer that comes next."""
        self._bytes = 0
        self._seconds = 0.0
        self._is_good = True
        granted.progress.begin(copies.step, 1)

    @property
    def is_over(self) -> bool:
        """Whether all layers are there."""
        return self.next == self._layers

    def layer(self) -> bool:
        """Load the next layer; whether it is what was promised."""
        first = self.next * PER_LAYER
        self.next += 1
        return self._load(range(first, first + PER_LAYER))

    def whole(self) -> bool:
        """Load all layers; whether they are what was promised."""
        self.next = self._layers
        return self._load([None])

    def cut(self, tokens: int) -> None:
        """Go on with the first so many tokens, whole moves of them."""
        kept = []
        for move in self._copies.moves:
            if tokens <= 0:
                break
            kept.append(move)
            tokens -= len(move.pages)
        self._copies = self._copies._replace(moves=kept)

    def end(self) -> None:
        """No copy will be made any more."""
        self._granted.progress.end(self._copies.step)
        if self.is_over and self._is_good:
            _log("Retrieved", self._copies, self._bytes, self._seconds)

    def _load(self, regions: Iterable[int | None]) -> bool:
        mover, started = self._granted.mover, time.perf_counter()
        mark = mover.mark()
        for region in regions:
            size, failed = mover.load(self._copies.moves, region, mark)
            self._bytes += size
            self._is_good &= not failed
        self._seconds += time.perf_counter() - started
        return self._is_good


class Worker:
    """The pools of one rank, as the only mover of an engine."""

    def __init__(
        self,
        engine_id: str,
        k_pool: Sequence[torch.Tensor],
        v_pool: Sequence[torch.Tensor],
        *,
        lends: bool = False,
        deadline_s: float = 1.0,
        exchanged: bool = False,
    ) -> None:
        """Begins to wait for a scheduling side. Raises `LMCacheError` for unknown pools."""
        self._layers = len(k_pool)
        self._device = k_pool[0].device
        self.pools = pools_of(k_pool, v_pool)
        self._grants = Grants(lends=lends, deadline_s=deadline_s)
        self._grants.lend(self.pools)
        layout = layout_of(self.pools, exchanged=exchanged)
        check_layout(layout, self.pools, [0] * len(self.pools))
        self._grants.open(engine_id, 0, layout, self.pools)

    def loading(self, copies: Copies) -> Loading | None:
        """A load that can begin; None if what it is to be loaded from is gone."""
        self._grants.take_back()
        granted = self._grants.current(copies.attachment)
        return Loading(granted, copies, self._layers) if granted else None

    def follow(self, stream: Any) -> None:
        """Have the copies that follow wait for what is queued on a stream of a device."""
        if self._device.type != "cpu" and stream is not None:
            self._module().current_stream().wait_stream(stream)

    def store(self, copies: Copies) -> bool:
        """Store all layers, and say so; whether it could be done."""
        self._grants.take_back()
        granted = self._grants.current(copies.attachment)
        if granted is None:
            return False
        if self._device.type != "cpu":  # SGLang does not say on which stream they are computed
            self._module().synchronize()
        mover, started = granted.mover, time.perf_counter()
        granted.progress.begin(copies.step, 1)
        try:
            size = mover.store(copies.moves, None, mover.mark())
            mover.publish(copies.moves)
        finally:
            granted.progress.end(copies.step)
        _log("Stored", copies, size, time.perf_counter() - started)
        return True

    def close(self) -> None:
        """Stop listening, and unmap the slab."""
        self._grants.leave()
        self._grants.close()

    def _module(self) -> Any:
        import torch

        return torch.get_device_module(self._device)


def _log(what: str, copies: Copies, size: int, seconds: float) -> None:
    tokens = sum(len(move.pages) for move in copies.moves)
    log_copies(logger, f"{what} {tokens} out of total {copies.total} tokens", size, seconds)
