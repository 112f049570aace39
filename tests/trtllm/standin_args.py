"""What an LLM is started with, as far as connectors look at it."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import standin_comm
from pydantic import BaseModel, ConfigDict, model_validator

OURS = "lmcache.integration.tensorrt_llm"
REGISTRY = {
    "lmcache": {
        "connector_module": f"{OURS}.tensorrt_adapter",
        "connector_scheduler_class": "LMCacheKvConnectorScheduler",
        "connector_worker_class": "LMCacheKvConnectorWorker",
    },
    "lmcache-mp": {
        "connector_module": f"{OURS}.tensorrt_mp_adapter",
        "connector_scheduler_class": "LMCacheMPKvConnectorScheduler",
        "connector_worker_class": "LMCacheMPKvConnectorWorker",
    },
    "kvbm": {
        "connector_module": "kvbm.trtllm_integration.connector",
        "connector_scheduler_class": "DynamoKVBMConnectorLeader",
        "connector_worker_class": "DynamoKVBMConnectorWorker",
    },
    "mooncake-store": {
        "connector_module": "tensorrt_llm._torch.pyexecutor.connectors.mooncake",
        "connector_scheduler_class": "MooncakeScheduler",
        "connector_worker_class": "MooncakeWorker",
    },
}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SchedulerConfig(Strict):
    capacity_scheduler_policy: str = "GUARANTEED_NO_EVICT"
    enable_prefix_aware_scheduling: bool = False


class KvCacheConfig(Strict):
    enable_block_reuse: bool = True
    enable_partial_reuse: bool = True
    tokens_per_block: int = 32
    max_tokens: int | None = None
    max_attention_window: list[int] | None = None
    host_cache_size: int | None = None
    dtype: str = "auto"
    use_kv_cache_manager_v2: bool = False


class ExplicitConnectorConfig(Strict):
    """Before there were presets."""

    connector_module: str
    connector_scheduler_class: str
    connector_worker_class: str


def preset_config(registry):
    """The class since there are presets."""

    class KvCacheConnectorConfig(Strict):
        connector: str | None = None
        connector_module: str | None = None
        connector_scheduler_class: str | None = None
        connector_worker_class: str | None = None
        server_url: str | None = None

        @model_validator(mode="after")
        def resolve(self):
            if self.connector is not None and self.connector not in registry:
                known = ", ".join(sorted(registry))
                raise ValueError(f"unknown connector {self.connector!r}; known are {known}")
            for name, value in registry.get(self.connector, {}).items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
            missing = [name for name in REGISTRY["lmcache"] if getattr(self, name) is None]
            if missing:
                raise ValueError(f"a connector needs {', '.join(missing)}")
            return self

    return KvCacheConnectorConfig


class TorchLlmArgsBase(Strict):
    model: str
    backend: str = "pytorch"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    enable_attention_dp: bool = False
    kv_cache_config: KvCacheConfig = KvCacheConfig()
    scheduler_config: SchedulerConfig = SchedulerConfig()
    disable_overlap_scheduler: bool = False
    enable_chunked_prefill: bool = False
    max_num_tokens: int = 8192
    max_beam_width: int = 1
    cuda_graph_config: dict | None = None
    speculative_config: dict | None = None

    @property
    def parallel_config(self):
        return SimpleNamespace(to_mapping=self._mapping)

    def _mapping(self):
        rank = standin_comm.mpi_rank()
        return SimpleNamespace(
            rank=rank,
            tp_rank=rank % self.tensor_parallel_size,
            tp_size=self.tensor_parallel_size,
            pp_size=self.pipeline_parallel_size,
            cp_size=self.context_parallel_size,
            world_size=self.tensor_parallel_size * self.pipeline_parallel_size,
        )


def args_module(profile):
    module = ModuleType("tensorrt_llm.llmapi.llm_args")
    registry = {name: REGISTRY[name] for name in profile.presets}
    config = preset_config(registry) if profile.presets else ExplicitConnectorConfig

    class TorchLlmArgs(TorchLlmArgsBase):
        kv_connector_config: config | None = None

    module.TorchLlmArgs = TorchLlmArgs
    module.KvCacheConnectorConfig = config
    module.KvCacheConfig = KvCacheConfig
    module.SchedulerConfig = SchedulerConfig
    return module, registry
