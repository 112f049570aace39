"""The connector module: what a scheduler is told, and the two classes a connector derives from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import field, make_dataclass
from types import ModuleType

DEFAULTS = {
    "block_hashes": list,
    "priorities": lambda: None,
    "cache_salt_id": lambda: None,
    "cache_salt": lambda: None,
    "new_block_ids_by_layer_group": list,
    "attention_dp_rank": lambda: None,
    "new_requests": list,
    "cached_requests": list,
}


class SchedulerBase(ABC):
    def __init__(self, llm_args):
        self._llm_args = llm_args
        super().__init__()

    @abstractmethod
    def get_num_new_matched_tokens(self, request, num_computed_tokens): ...

    @abstractmethod
    def update_state_after_alloc(self, request, block_ids): ...

    @abstractmethod
    def build_connector_meta(self, scheduler_output): ...

    @abstractmethod
    def request_finished(self, request, cache_block_ids): ...


class Waits:
    """Since 1.3."""

    def wait_for_initialization(self):
        return None


class Groups:
    """Main: one list of blocks for each group of layers, and offers that may be turned down."""

    supports_attention_dp = False

    def update_state_after_alloc_by_layer_group(self, request, block_ids_by_layer_group):
        [blocks] = self._only(block_ids_by_layer_group)
        return self.update_state_after_alloc(request, blocks)

    def request_finished_by_layer_group(self, request, cache_block_ids_by_layer_group):
        [blocks] = self._only(cache_block_ids_by_layer_group)
        return self.request_finished(request, blocks)

    def cancel_load(self, request, start, end):
        return None

    def request_reset(self, request):
        return None

    @staticmethod
    def _only(groups):
        if len(groups) != 1:
            raise NotImplementedError("this connector knows one group of layers")
        return groups


class WorkerBase(ABC):
    def __init__(self, llm_args):
        self._llm_args = llm_args
        self._metadata = None
        super().__init__()

    def bind_connector_meta(self, metadata):
        self._metadata = metadata

    def get_connector_meta(self):
        return self._metadata

    def _clear_connector_meta(self):
        self._metadata = None

    @abstractmethod
    def register_kv_caches(self, kv_cache_tensor): ...

    @abstractmethod
    def start_load_kv(self, stream): ...

    @abstractmethod
    def wait_for_layer_load(self, layer_idx, stream): ...

    @abstractmethod
    def save_kv_layer(self, layer_idx, stream): ...

    @abstractmethod
    def wait_for_save(self, stream): ...

    @abstractmethod
    def get_finished(self, finished_gen_req_ids, started_loading_req_ids): ...


class Graphs:
    """Since 1.2."""

    def register_forward_pass_callable(self):
        return None


class Layouts:
    """Main."""

    supports_attention_dp = False

    def register_kv_cache_layout(self, layout):
        self.register_kv_caches(layout.as_single_pool_tensor())


def _record(name, fields, path):
    made = [
        (each, object, field(default_factory=DEFAULTS[each])) if each in DEFAULTS else each
        for each in fields
    ]
    return make_dataclass(name, made, namespace={"__module__": path})


def connector_module(profile):
    """The module of a version, at that version's place."""
    module = ModuleType(profile.path)
    scheduler = [SchedulerBase, *[Waits] * profile.waits_for_start, *[Groups] * profile.main]
    worker = [WorkerBase, *[Graphs] * profile.cuda_graphs, *[Layouts] * profile.main]
    for name, bases in (
        ("KvCacheConnectorScheduler", scheduler),
        ("KvCacheConnectorWorker", worker),
    ):
        setattr(module, name, type(name, tuple(bases), {"__module__": profile.path}))
    module.RequestData = _record("RequestData", profile.fields, profile.path)
    module.SchedulerOutput = _record("SchedulerOutput", profile.output_fields, profile.path)
    return module
