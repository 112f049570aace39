"""The classes of the preset `lmcache`: the cache is in the leader's process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmcache.adapters.trtllm.hooks import SchedulerHooks, WorkerHooks
from lmcache.adapters.trtllm.translate import ranks_of
from lmcache.core.embedding import embed
from lmcache.core.joining import Joining
from lmcache.plugins.manager import PluginManager

if TYPE_CHECKING:
    from lmcache.adapters.trtllm.settings import Settings
    from lmcache.core.keys import Namespace


class LMCacheKvConnectorScheduler(SchedulerHooks):
    """Decides, for all ranks of one node."""

    def _join(self, engine_id: str, settings: Settings, namespace: Namespace) -> Joining[Any]:
        config, plugins = settings.loaded.config, PluginManager()
        ranks = ranks_of(self._llm_args)
        return Joining(lambda: embed(engine_id, ranks, config, plugins))


class LMCacheKvConnectorWorker(WorkerHooks):
    """Copies, on every rank."""
