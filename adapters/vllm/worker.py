"""Where the pages are: every worker of vLLM. Runs on the worker's main thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config import get_current_vllm_config_or_none

from lmcache.adapters.vllm.grants import VllmGrants
from lmcache.adapters.vllm.loads import BatchLoads
from lmcache.adapters.vllm.outside import OutsideLoads
from lmcache.adapters.vllm.step import Step, StoredEvent
from lmcache.adapters.vllm.stores import Stores
from lmcache.adapters.vllm.translate import stores_may_lag
from lmcache.core.mover import pages_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from vllm.config import VllmConfig

    from lmcache.core.grants import Granted


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
        exchanged: bool = False,
        deadline_s: float = 1.0,
    ) -> None:
        """With `outside`, loads are made while the batch goes on, and `take_received` tells.

        With `may_have_groups`, vLLM asks which requests failed, not only for pages.

        With `lends`, another process makes the copies, each of which may take `deadline_s` and what
        its bytes take besides.

        With `exchanged`, objects are in the order of an exchange.
        """
        self._layerwise = layerwise
        self.grants = VllmGrants(
            vllm_config,
            kv_cache_config,
            may_have_groups=may_have_groups,
            lends=lends,
            exchanged=exchanged,
            deadline_s=deadline_s,
        )
        self._regions: dict[str, int] = {}
        self._outside = OutsideLoads() if outside else None
        self._loads = BatchLoads(self._lose)
        engine = get_current_vllm_config_or_none()
        self.stores = Stores(behind=stores_may_lag(engine, kv_cache_config))
        self._now: Granted | None = None
        """For the step at hand; None if the slab it was planned for is not mapped."""
        self._step = Step()
        self._is_idle = False
        self._failed: set[int] = set()
        self._tainted = 0
        """Steps, this one included, that may compute from pages a load left without content."""
        self._in_flight = vllm_config.parallel_config.pipeline_parallel_size + bool(
            vllm_config.scheduler_config.async_scheduling
        )
        """Steps that vLLM may have scheduled before it hears of a failed load."""

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Learn the layout and wait, on another thread, for the scheduling side."""
        self._regions = self.grants.register(kv_caches)
        if self._outside:
            self._outside.by_request = not self.grants.keeps_all

    # ---- one step of vLLM

    def begin(self, step: Step) -> None:
        """A step was bound. Where vLLM starts loads after the forward pass, layers store before."""
        self.stores.begin(step)
        self.grants.take_back()
        self._step, self._now = step, self.grants.current(step.attachment)
        self._is_idle = step.is_idle
        if self._now and step.loads and not self._outside:
            self._loads.begin(step, self._now.mover)
        self._begin_answer(step)
        self._lose(step.lost, step.unloaded)

    def start_load(self, step: Step, *, by_layer: bool) -> None:
        """Fill pages before the forward pass; with `by_layer`, before each layer's attention."""
        if step is not self._step:
            self.begin(step)
        if not step.loads:
            return
        if self._now is None:
            self.give_up(step)
        elif self._outside:
            self._outside.submit(step, self._now.mover, self._now.progress)
        elif self._layerwise and by_layer:
            self._loads.ahead()
        else:
            self._loads.whole()

    def load_layer(self, name: str) -> None:
        """Fill one layer's share of the pages, before its attention."""
        if self._layerwise:
            self._loads.layer(self._regions.get(name))

    def store_layer(self, name: str) -> None:
        """Store one layer's share of the pages, after its attention."""
        region = self._regions.get(name)
        if self._layerwise and self._step.stores and self._now and region is not None:
            self.stores.layer(self._now.mover, self._step, region)

    def finish(self) -> None:
        """Copy what no layer asked for, and tell the scheduling side when all copies are done.

        Nothing is stored that may have been computed from pages without their content.
        """
        now, step = self._now, self._step
        try:
            self._loads.end()
        finally:
            if now and step.number and self._answers_here(step):
                self._end(now, step)
            self._step, self._now = Step(), None
            self._tainted = max(0, self._tainted - 1)

    def give_up(self, step: Step) -> None:
        """An error left the loads of a step in an unknown state: report all their pages."""
        self._loads.leave()
        self._lose(step.lost, step.unloaded)
        if not self._outside:
            self._lose(pages_of(step.all_loads()))
            return
        self._outside.miss(step.loads)
        if self._now and step.number:
            for _ in step.loads:
                self._now.progress.end(step.number)

    def close(self) -> None:
        """Stop listening, and unmap the slab."""
        self.grants.leave()
        if self._outside:
            self._outside.close()
        self.stores.close()
        self._loads.close()
        self._now = None
        self.grants.close()

    def take_events(self) -> list[StoredEvent]:
        """What was stored since the last call, if events are wanted."""
        return self.stores.take_events()

    def take_failed_pages(self) -> set[int]:
        """Pages that loads left without their content since the last call."""
        failed, self._failed = self._failed, set()
        return failed | self._outside.take_failed_pages() if self._outside else failed

    def take_received(self) -> set[str]:
        """Requests whose loads outside the batch have ended since the last call, well or not.

        Of those that did not end well, `take_failed_pages` has the pages from now on, or
        `take_failed_requests` the names where pages are not for themselves.
        """
        return self._outside.take_received(is_idle=self._is_idle) if self._outside else set()

    def take_failed_requests(self) -> set[str]:
        """Requests that did not get what they waited for, where all of it is needed."""
        return self._outside.take_failed_requests() if self._outside else set()

    # ----

    def _answers_here(self, step: Step) -> bool:
        """Whether `finish` has a part of the step to end, here or behind the engine."""
        return bool(step.stores) or not self._outside

    def _end(self, now: Granted, step: Step) -> None:
        """Store what there is to store, and answer when that is done."""
        spoiled = bool(self._tainted)

        def ended() -> None:
            if spoiled:
                now.mover.spoil(step.number)
            now.progress.end(step.number)

        if step.stores:
            self.stores.rest(now.mover, [] if spoiled else step.stores, ended)
        else:
            ended()

    def _begin_answer(self, step: Step) -> None:
        """Expect as many ends of a step as it has parts that go their own ways."""
        if self._now and step.number:
            loads = len(step.loads) if self._outside else 0
            self._now.progress.begin(step.number, loads + self._answers_here(step))

    def _lose(self, pages: list[int], requests: Sequence[str] = ()) -> None:
        """Pages without their content, and the requests that wait for them outside the batch."""
        if self._outside:  # nothing has been computed from them
            self._outside.refuse(list(requests), pages)
        elif pages:
            self._failed.update(pages)
            self._tainted = self._in_flight
