"""The classes of the preset `lmcache-mp`: the cache is a server's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lmcache
from lmcache.adapters.trtllm.hooks import SchedulerHooks, WorkerHooks
from lmcache.adapters.trtllm.settings import WATCH_S
from lmcache.adapters.trtllm.translate import ranks_of
from lmcache.core.service.attaching import Place, join_server

if TYPE_CHECKING:
    from lmcache.adapters.trtllm.settings import Settings
    from lmcache.core.joining import Joining
    from lmcache.core.keys import Namespace


class LMCacheMPKvConnectorScheduler(SchedulerHooks):
    """Asks the server, for all ranks of one node."""

    LOADS_OUTSIDE = True

    def _join(self, engine_id: str, settings: Settings, namespace: Namespace) -> Joining[Any]:
        loaded = settings.loaded
        place = Place(
            endpoint=settings.endpoint,
            # TensorRT-LLM's pools cannot always be lent to another process
            mode="engine_driven",
            deadline_s=settings.deadline_s,
            watch_s=WATCH_S,
            patience_s=settings.deadline_s,
        )
        return join_server(
            place,
            namespace,
            release=lmcache.__version__,
            engine_id=engine_id,
            name=loaded.config.lmcache_instance_id or f"{self._llm_args.model}@{engine_id}",
            movers=ranks_of(self._llm_args),
            chunk_size=(
                None if loaded.sources["chunk_size"] == "default" else loaded.config.chunk_size
            ),
        )


class LMCacheMPKvConnectorWorker(WorkerHooks):
    """Copies, on every rank."""
