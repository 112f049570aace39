"""The hooks that are the same for both connectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmcache.core.errors import LMCacheError
from lmcache.core.log import init_logger
from lmcache.core.wall import TOLERATED, Wall, guarded, nothing

if TYPE_CHECKING:
    import torch

    from lmcache.adapters.vllm.scheduler import SchedulerSide
    from lmcache.adapters.vllm.step import Step
    from lmcache.adapters.vllm.worker import WorkerSide

logger = init_logger(__name__)


class Hooks(Wall):
    """What vLLM calls alike, whoever holds the cache. One of the two sides is there."""

    _worker: WorkerSide | None = None
    _scheduler: SchedulerSide | None = None

    @guarded(nothing)
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """vLLM has allocated its pages."""
        assert self._worker, "only workers have pages"
        try:
            self._worker.register_kv_caches(kv_caches)
        except LMCacheError as error:
            logger.error("LMCache is off for this engine: %s", error)

    def begin(self, step: Step) -> None:
        """A step begins. However often we failed: stores must be off the pages it writes to."""
        assert self._worker
        try:
            self._worker.begin(step)
        except Exception:
            self.count_error("bind_connector_metadata")

    def wait_for_save(self) -> None:
        """Have what the step computed stored before vLLM writes to those pages again."""
        assert self._worker
        try:
            self._worker.finish()
        except Exception:
            self.count_error("wait_for_save")

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages that could not be filled; vLLM recomputes or fails their requests."""
        assert self._worker
        return self._worker.take_failed_pages()

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        """The copies that go with this step, and the pages nobody will fill after all."""
        assert self._scheduler
        try:
            if self.errors < TOLERATED:
                return self._scheduler.build(scheduler_output)
        except Exception:
            self.count_error("build_connector_meta")
            self._scheduler.lose_track()
        return self._scheduler.without_copies(scheduler_output)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request ended; its pages are free at once: its stores are done, or fenced."""
        assert self._scheduler
        try:
            return False, self._scheduler.finished(request)
        except Exception:
            self.count_error("request_finished")
            return False, None

    def shutdown(self) -> None:
        """Let go of everything. vLLM does not call it in-process: the process's end does it."""
        self.errors = TOLERATED
        for side in (self._scheduler, self._worker):
            if side:
                side.close()
