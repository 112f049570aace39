"""The class vLLM loads in-process: every hook it calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmcache.adapters.vllm.hooks import Hooks
from lmcache.adapters.vllm.live import LIVE
from lmcache.adapters.vllm.scheduler import SchedulerSide
from lmcache.adapters.vllm.step import Step
from lmcache.adapters.vllm.translate import fence_page_tokens, namespace_of
from lmcache.adapters.vllm.worker import WorkerSide
from lmcache.core.config import load_config
from lmcache.core.embedding import embed
from lmcache.core.errors import ConfigError
from lmcache.core.joining import Joining
from lmcache.core.log import init_logger
from lmcache.core.wall import guarded, nothing
from lmcache.plugins.manager import PluginManager

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

    from lmcache.core.config import Config

logger = init_logger(__name__)


def _no_tokens() -> int | None:
    return 0


def _no_events() -> list[Any]:
    return []


class LMCacheConnectorV1Impl(Hooks):
    """vLLM's in-process connector: one instance where it schedules, one in every worker."""

    def __init__(self, vllm_config: VllmConfig, role: Any, parent: Any) -> None:
        """Raises `ConfigError` for a configuration that cannot be honoured."""
        self._parent = parent
        extra = _transfer(vllm_config).kv_connector_extra_config or {}
        config = load_config(extra).config
        if config.exchange and config.use_layerwise:
            raise ConfigError("pages for an exchange are reordered whole: unset use_layerwise")
        if role.name == "WORKER":
            layerwise = config.use_layerwise and _layerwise_is_safe(vllm_config, extra)
            self._worker = WorkerSide(
                vllm_config,
                parent._kv_cache_config,
                layerwise=layerwise,
                exchanged=bool(config.exchange),
            )
        else:
            self._scheduler = _scheduler_side(vllm_config, config, extra)
        LIVE.add(self)

    # ---- worker

    def bind_connector_metadata(self, step: Step) -> None:
        """A step begins; `start_load_kv` follows in any case."""
        self.begin(step)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Load before the forward pass. An error here must not pass for a load that worked."""
        assert self._worker
        step = self._bound()
        by_layer = getattr(forward_context, "attn_metadata", None) is not None
        try:
            self._worker.start_load(step, by_layer=by_layer)
        except Exception:
            self.count_error("start_load_kv")
            self._worker.give_up(step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Load one layer before its attention."""
        assert self._worker
        try:
            self._worker.load_layer(layer_name)
        except Exception:
            self.count_error("wait_for_layer_load")
            self._worker.give_up(self._bound())

    @guarded(nothing)
    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Store one layer after its attention."""
        assert self._worker
        self._worker.store_layer(layer_name)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """No request waits for a copy outside the batch."""
        return None, None

    @guarded(_no_events)
    def get_kv_events(self) -> list[Any]:
        """Events for vLLM's KV event stream."""
        assert self._worker
        return self._worker.take_events()

    # ---- scheduler

    @guarded(_no_tokens)
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> int | None:
        """Tokens that can be loaded beyond vLLM's own; None to be asked again."""
        assert self._scheduler
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, num_external_tokens: int) -> None:
        """vLLM has made room for a load, or says that it will not need one."""
        assert self._scheduler
        try:
            self._scheduler.allocated(request, num_external_tokens)
        except Exception:
            self.count_error("update_state_after_alloc")

    def _bound(self) -> Step:
        """The step vLLM's wrapper holds for the worker."""
        step = self._parent._connector_metadata
        return step if isinstance(step, Step) else Step()


def _transfer(vllm_config: VllmConfig) -> Any:
    """The part of vLLM's configuration that asked for us."""
    return vllm_config.kv_transfer_config


def _layerwise_is_safe(vllm_config: VllmConfig, extra: dict[str, Any]) -> bool:
    """Whether vLLM will call the hooks of every layer: a full CUDA graph skips them."""
    if (
        extra.get("use_layerwise")
        or vllm_config.model_config.enforce_eager
        or vllm_config.device_config.device_type == "cpu"
    ):
        return True
    logger.warning(
        "use_layerwise is on, but CUDA graphs skip the hooks of the layers: loading whole; "
        'add "use_layerwise": true to kv_connector_extra_config'
    )
    return False


def _scheduler_side(
    vllm_config: VllmConfig, config: Config, extra: dict[str, Any]
) -> SchedulerSide:
    transfer = _transfer(vllm_config)
    plugins = PluginManager()
    engine_id = transfer.engine_id
    if getattr(transfer, "kv_load_failure_policy", "recompute") != "recompute":
        logger.info(
            "vLLM is set to fail a request whose load fails; "
            '"kv_load_failure_policy": "recompute" in kv-transfer-config computes it instead'
        )

    return SchedulerSide(
        config,
        namespace_of(vllm_config, config),
        Joining(lambda: embed(engine_id, vllm_config.parallel_config.world_size, config, plugins)),
        role=transfer.kv_role,
        details=bool(extra.get("enable_cache_usage_details_in_response")),
        fence_page_tokens=fence_page_tokens(vllm_config),
    )
