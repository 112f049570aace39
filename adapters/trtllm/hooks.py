"""Every hook that TensorRT-LLM calls, for both of our connectors."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lmcache.adapters.trtllm import api
from lmcache.adapters.trtllm.asking import Answerer, Asker, make_pipes, remove_pipes
from lmcache.adapters.trtllm.meeting import ASKERS, LIVE, engine_id_for
from lmcache.adapters.trtllm.scheduler import Scheduler
from lmcache.adapters.trtllm.settings import PASSED_ON, load_settings
from lmcache.adapters.trtllm.step import Step
from lmcache.adapters.trtllm.translate import (
    check_args,
    kind_of,
    layout_of,
    namespace_of,
    page_tokens_of,
    ranks_of,
    regions_layout,
)
from lmcache.adapters.trtllm.worker import Worker
from lmcache.core.environment import adopt_environment
from lmcache.core.errors import LayoutError, LMCacheError
from lmcache.core.wall import TOLERATED, Wall, guarded, nothing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from lmcache.adapters.trtllm.settings import Settings
    from lmcache.core.joining import Joining
    from lmcache.core.keys import Namespace
    from lmcache.core.layout import PageLayout


def _no_tokens() -> tuple[int, bool]:
    return 0, False


def _problem_of(call: Callable[[], None]) -> str:
    """What a call raises, to be told to other ranks; empty for nothing."""
    try:
        call()
    except LMCacheError as error:
        return str(error)
    except Exception as error:
        return repr(error)
    return ""


class SchedulerHooks(Wall, api.KvCacheConnectorScheduler):
    """On the leader alone."""

    LOADS_OUTSIDE = False
    """Whether requests wait for their loads outside the batch, where they can: see `api`."""

    def __init__(self, llm_args: Any) -> None:
        """Raises `ConfigError` for what cannot be cached, or cannot be configured so."""
        super().__init__(llm_args)
        check_args(llm_args)
        settings = load_settings(llm_args)
        config = settings.loaded.config
        engine_id = engine_id_for(llm_args, "scheduler")
        namespace = namespace_of(llm_args, config)
        self._scheduler = Scheduler(
            config,
            namespace,
            engine_id,
            lambda: self._join(engine_id, settings, namespace),
            page_tokens=page_tokens_of(llm_args),
            asker=lambda: ASKERS.get(engine_id),
            tells_of_cancels=api.TELLS_OF_CANCELS,
            outside=self.LOADS_OUTSIDE and api.TELLS_OF_CANCELS,
        )
        LIVE.add(self)

    def _join(self, engine_id: str, settings: Settings, namespace: Namespace) -> Joining[Any]:
        raise NotImplementedError

    def wait_for_initialization(self) -> None:
        """All ranks have pools: the cache can be joined. Older versions do not say so."""
        self._scheduler.start()

    @guarded(_no_tokens)
    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Tokens that will be loaded beyond TensorRT-LLM's own; whether outside the batch."""
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        """Which blocks it has."""
        with self._wall("update_state_after_alloc"):
            self._scheduler.admitted(request.request_id, block_ids)

    def update_state_after_alloc_by_layer_group(
        self, request: Any, block_ids_by_layer_group: list[list[int]]
    ) -> None:
        """Likewise. Who says it so keeps, of a request that ends, the blocks that it had.

        Others keep, of each block, the first that they know to hold the same.
        """
        with self._wall("update_state_after_alloc_by_layer_group"):
            [block_ids] = block_ids_by_layer_group
            self._scheduler.keeps_blocks = True
            self.update_state_after_alloc(request, block_ids)

    def build_connector_meta(self, scheduler_output: Any) -> Step | None:
        """What every rank copies with the pass that follows."""
        owes = self._scheduler.owes(scheduler_output)
        try:
            return self._scheduler.build(scheduler_output)
        except Exception:
            self.count_error("build_connector_meta")
            text = "an error of LMCache's, see the leader's log: blocks were promised and are lost"
            return Step(broken=text) if owes else None

    def cancel_load(self, request: Any, start: int, end: int) -> None:
        """A part of what was promised is not wanted."""
        with self._wall("cancel_load"):
            self._scheduler.give_up(request.request_id, start, end)

    def request_reset(self, request: Any) -> None:
        """A request has lost its blocks and will be asked about again."""
        with self._wall("request_reset"):
            self._scheduler.forget(request.request_id)

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        """Whether its blocks, or the same of others, stay until all ranks have been asked."""
        with self._wall("request_finished"):
            if cache_block_ids:
                return self._scheduler.finished(request.request_id)
            self._scheduler.forget(request.request_id)  # it has lost them before
        return False

    def request_finished_by_layer_group(
        self, request: Any, cache_block_ids_by_layer_group: list[list[int]]
    ) -> bool:
        """Likewise."""
        with self._wall("request_finished_by_layer_group"):
            [block_ids] = cache_block_ids_by_layer_group
            return self.request_finished(request, block_ids)
        return False

    @contextmanager
    def _wall(self, where: str) -> Iterator[None]:
        """Errors stop here, but however many there were: what is not tidied up stays leased."""
        try:
            yield
        except Exception:
            self.count_error(where)

    def shutdown(self) -> None:
        """Let go of everything; again does nothing."""
        LIVE.discard(self)
        self._scheduler.close()


class WorkerHooks(Wall, api.KvCacheConnectorWorker):
    """On every rank."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        adopt_environment(PASSED_ON)
        self._rank = api.rank()
        self._ranks = ranks_of(llm_args)
        self._kind = kind_of(llm_args)
        self._page_tokens = page_tokens_of(llm_args)
        # only the leader has a scheduler, whose name for the engine counts
        self._engine_id = "" if self._rank else engine_id_for(llm_args, "worker")
        self._worker = Worker(self._rank)
        self._stored: list[int] = []
        """Requests that are stored, of which we have not told."""
        LIVE.add(self)

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        """The pool. Raises `LayoutError` for one that cannot be copied safely."""
        self._open(
            lambda: (
                layout_of(kv_cache_tensor, self._page_tokens, self._kind),
                [kv_cache_tensor],
            )
        )

    def register_kv_cache_layout(self, layout: Any) -> None:
        """Likewise, where pools are described."""
        self._open(lambda: regions_layout(layout, self._kind))

    def _open(self, look: Callable[[], tuple[PageLayout, list[torch.Tensor]]]) -> None:
        """Be there for the scheduler, which may look for the ranks when all have returned.

        What one of them refuses is refused by all: who goes on would wait for it for ever.
        """
        engine_id = api.from_leader(self._engine_id)
        try:
            problem = api.from_leader("" if self._rank else _problem_of(self._make_pipes))
            if not problem:
                problem = _problem_of(lambda: self._begin(engine_id, *look()))
            problems = api.from_all(problem)
        finally:
            if not self._rank:
                remove_pipes(engine_id)  # all ranks have opened theirs
        for text in filter(None, problems):
            self._close()
            raise LayoutError(text)

    def _make_pipes(self) -> None:
        make_pipes(self._engine_id, self._ranks)

    def _begin(self, engine_id: str, layout: PageLayout, tensors: list[torch.Tensor]) -> None:
        answerer = Answerer(engine_id, self._rank)
        if not self._rank:
            ASKERS[engine_id] = Asker(engine_id, self._ranks, answerer)
        self._worker.open(engine_id, answerer, layout, tensors)

    def start_load_kv(self, stream: Any) -> None:
        """Load what the pass counts on, and begin what others wait for outside the batch.

        Raises `RuntimeError` if that cannot be: nothing else would keep TensorRT-LLM from answering
        from what is not there.
        """
        step = self.get_connector_meta()
        self._clear_connector_meta()  # TensorRT-LLM does not, and may call again
        self._worker.begin(step, stream)

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """All layers have been loaded: a pass that is replayed as a CUDA graph calls no hook."""

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """All layers are stored together, for the same reason."""

    def wait_for_save(self, stream: Any) -> None:
        """Store what the pass before has computed, if its requests are in this one.

        After too many errors nothing is stored.
        """
        try:
            self._worker.finish(stream if self.errors < TOLERATED else None)
        except Exception:
            self.count_error("wait_for_save")

    def get_finished(
        self, finished_gen_req_ids: Sequence[int], started_loading_req_ids: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """The requests whose stores, and those whose loads outside the batch, are over.

        Gives up a step whose `wait_for_save` never came, as its pass has failed. Raises
        `RuntimeError` for a load that failed, as `start_load_kv` does.
        """
        self._abandon()
        stored = self._worker.stored(finished_gen_req_ids)
        self._settle(stored)
        return self._to_tell(stored), self._worker.loaded(started_loading_req_ids)

    def _to_tell(self, stored: list[int]) -> list[int]:
        stored = self._stored + stored
        first = 1 if api.FORGETS_STORES else len(stored)
        self._stored = stored[first:]
        return stored[:first]

    @guarded(nothing)
    def _settle(self, stored: list[int]) -> None:
        self._worker.settle(stored)

    @guarded(nothing)
    def _abandon(self) -> None:
        self._worker.finish(None)

    def shutdown(self) -> None:
        """Let go of everything; again does nothing."""
        LIVE.discard(self)
        self._close()

    def _close(self) -> None:
        ASKERS.pop(self._engine_id, None)
        self._worker.close()
