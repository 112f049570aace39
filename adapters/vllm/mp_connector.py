"""The class vLLM loads to share a server with other engines: every hook it calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA

import lmcache
from lmcache.adapters.vllm.autostart import Autostart
from lmcache.adapters.vllm.groups import Groups, groups_of, tables_of
from lmcache.adapters.vllm.hooks import Hooks
from lmcache.adapters.vllm.live import LIVE
from lmcache.adapters.vllm.mp_options import PREFIX, MpOptions, split_options
from lmcache.adapters.vllm.scheduler import SchedulerSide
from lmcache.adapters.vllm.step import Step
from lmcache.adapters.vllm.translate import fence_page_tokens, namespace_of
from lmcache.adapters.vllm.worker import WorkerSide
from lmcache.core.config import LoadedConfig, load_config
from lmcache.core.errors import ConfigError, LayoutError
from lmcache.core.log import init_logger
from lmcache.core.service.attaching import Place, join_server
from lmcache.core.wall import guarded, nothing

try:  # vLLM 0.32 and later tell hits by where they come from
    from vllm.distributed.kv_transfer.kv_connector.v1.base import CacheHitSource
except ImportError:
    CacheHitSource = None

try:  # vLLM 0.30 and later ask which requests did not get their loads
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
except ImportError:
    KVConnectorTransferResults = None

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from vllm.config import VllmConfig

logger = init_logger(__name__)


THE_SERVERS = (
    "max_local_cpu_size",
    "local_cpu",
    "local_disk",
    "max_local_disk_size",
    "remote_url",
    "l2",
    "cache_policy",
    "lookup_timeout_ms",
    "fetch_timeout_ms",
    "pin_timeout_sec",
    "metrics_port",
    "enable_kv_events",
    "use_layerwise",
)
"""Keys that mean nothing to an engine whose cache is a server's."""


def _no_tokens() -> tuple[int | None, bool]:
    return 0, False


class LMCacheMPConnector(Hooks, KVConnectorBase_V1, SupportsHMA):
    """One instance where vLLM schedules, one in every worker; the cache is the server's."""

    def __init__(self, vllm_config: VllmConfig, role: Any, kv_cache_config: Any = None) -> None:
        """Raises `ConfigError` for a configuration that cannot be honoured."""
        super().__init__(vllm_config, role, kv_cache_config)
        transfer: Any = vllm_config.kv_transfer_config
        options, rest = split_options(transfer.kv_connector_extra_config or {})
        loaded = load_config(rest)
        self._eager = options.eager_prefetch
        lends, exchanged = options.mp_transfer_mode == "lmcache_driven", loaded.config.exchange
        if lends and exchanged:
            raise ConfigError(
                f"the server cannot reorder pages for an exchange: set {PREFIX}mp_transfer_mode to "
                "engine_driven"
            )
        if role.name == "WORKER":
            self._worker = WorkerSide(
                vllm_config,
                kv_cache_config,
                outside=True,
                may_have_groups=KVConnectorTransferResults is not None,
                lends=lends,
                exchanged=bool(exchanged),
                deadline_s=options.mq_timeout,
            )
        else:
            self._scheduler = _scheduler_side(vllm_config, kv_cache_config, loaded, options)
        LIVE.add(self)

    if CacheHitSource is not None:
        _cache_hit_source = CacheHitSource.HOST

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is a miss later, and nothing worse."""
        return False

    # ---- worker

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """A step begins; `start_load_kv` follows in any case."""
        super().bind_connector_metadata(connector_metadata)
        self.begin(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Have the loads made while the batch goes on."""
        assert self._worker
        step = self._bound()
        try:
            self._worker.start_load(step, by_layer=False)
        except Exception:
            self.count_error("start_load_kv")
            self._worker.give_up(step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded for the batch at hand."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """All layers are stored together, in `wait_for_save`."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose loads have ended, well or not. Nobody waits for stores."""
        assert self._worker
        return None, self._worker.take_received() or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Likewise, and which of them did not get all of it, where they need all."""
        assert self._worker
        received = self._worker.take_received()
        failed = self._worker.take_failed_requests()
        return KVConnectorTransferResults(finished_recving=received, failed_recving=failed)

    # ---- scheduler

    def on_new_request(self, request: Any) -> None:
        """A request has arrived."""
        if self._eager:
            self._prefetch(request)

    @guarded(nothing)
    def _prefetch(self, request: Any) -> None:
        assert self._scheduler
        self._scheduler.prefetch(request)

    @guarded(_no_tokens)
    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond vLLM's own; None to be asked again."""
        assert self._scheduler
        tokens = self._scheduler.matched_tokens(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """vLLM has made room for a load, or says that it will not need one."""
        assert self._scheduler
        try:
            tables = tables_of(blocks.get_block_ids()) if num_external_tokens else None
            self._scheduler.allocated(request, num_external_tokens, tables)
        except Exception:
            self.count_error("update_state_after_alloc")

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Likewise, for all cache groups together."""
        return self.request_finished(request, [])

    def take_events(self) -> Iterable[Any]:
        """No events for vLLM's event stream: the server is not the engine's own."""
        return ()

    def reset_cache(self) -> bool | None:
        """The server's chunks are not this engine's to drop; `lmcache kvcache clear` does that."""
        return False

    # ---- both

    def _bound(self) -> Step:
        step = self._connector_metadata
        return step if isinstance(step, Step) else Step()


def _scheduler_side(
    vllm_config: VllmConfig, kv_cache_config: Any, loaded: LoadedConfig, options: MpOptions
) -> SchedulerSide:
    transfer: Any = vllm_config.kv_transfer_config
    config = loaded.config
    if options.save_decode_cache is not None:
        config = config.model_copy(update={"save_decode_cache": options.save_decode_cache})
    _warn_of_what_is_the_servers(loaded)
    namespace = namespace_of(vllm_config, config)
    autostart = Autostart(options) if options.autostart else None
    joining = join_server(
        Place(
            endpoint=options.endpoint,
            mode=options.mp_transfer_mode,
            deadline_s=options.mq_timeout,
            watch_s=options.heartbeat_interval,
            patience_s=None if options.nonblocking_lookup_status else options.mq_timeout,
        ),
        namespace,
        release=lmcache.__version__,
        engine_id=transfer.engine_id,
        name=config.lmcache_instance_id or f"{vllm_config.model_config.model}@{transfer.engine_id}",
        movers=vllm_config.parallel_config.world_size,
        chunk_size=None if loaded.sources["chunk_size"] == "default" else config.chunk_size,
        before=autostart.ensure if autostart else None,
    )
    return SchedulerSide(
        config,
        namespace,
        joining,
        role=transfer.kv_role,
        groups=_groups(kv_cache_config),
        outside=True,
        fence_page_tokens=fence_page_tokens(vllm_config),
    )


def _groups(kv_cache_config: Any) -> Groups:
    try:
        return groups_of(kv_cache_config)
    except LayoutError:  # the workers say so, and nobody attaches
        return Groups()


def _warn_of_what_is_the_servers(loaded: LoadedConfig) -> None:
    chosen = [key for key in THE_SERVERS if loaded.sources[key] != "default"]
    if chosen:
        logger.warning("set these where the server is started, not here: %s", ", ".join(chosen))
