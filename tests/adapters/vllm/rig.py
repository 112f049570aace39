"""An engine without a model: vLLM's own scheduler and wrapper, our connector, and a fake forward
pass.

engine = Engine(base_config, chunk_size=16)
engine.add("a", range(40), max_tokens=2)
engine.run()
assert engine.outputs["a"] == continuation(range(40), 2)
"""

from __future__ import annotations

import copy
import itertools
import json
import time
import uuid
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fake_codes import continuation
from fake_runner import WRONG_TOKEN, Rank, Runner, impl_of
from vllm import SamplingParams
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.utils.hashing import sha256
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_configs,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.utils import allocate_kv_cache

from lmcache.core.slab import CONTROL_BYTES

PAGE = 4
CHUNK = 16
LAYERS = 2
HEADS, HEAD_SIZE = 2, 4
MAX_LENGTH = 256
GIB = 1 << 30

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "vocab_size": 1000,
    "max_position_embeddings": MAX_LENGTH,
    "torch_dtype": "bfloat16",
}


class MLAModel(ModelConfig):
    """A model whose ranks all hold the same latent vectors."""

    @property
    def use_mla(self) -> bool:
        return True


class Layer:
    """Stands for an attention layer where vLLM looks layers up."""

    def get_attn_backend(self) -> Any:
        return CPUAttentionBackend


def make_base_config(folder: Path) -> VllmConfig:
    """vLLM's configuration of a model that is never loaded."""
    (folder / "config.json").write_text(json.dumps(MODEL))
    init_none_hash(sha256)
    return VllmConfig(
        model_config=ModelConfig(
            model=str(folder),
            skip_tokenizer_init=True,
            max_model_len=MAX_LENGTH,
            dtype="bfloat16",
            enforce_eager=True,
        ),
        cache_config=CacheConfig(block_size=PAGE),
        scheduler_config=SchedulerConfig(
            max_num_seqs=8,
            max_num_batched_tokens=MAX_LENGTH,
            max_model_len=MAX_LENGTH,
            is_encoder_decoder=False,
            async_scheduling=False,
            disable_hybrid_kv_cache_manager=True,
        ),
        kv_transfer_config=KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both"),
        device_config=DeviceConfig("cpu"),
    )


class Engine:
    """One engine of vLLM, driven step by step."""

    def __init__(
        self,
        base: VllmConfig,
        *,
        pages: int = 200,
        budget: int = 64,
        prefix_caching: bool = False,
        room_bytes: int = 4 << 20,
        role: str = "kv_both",
        options: dict[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
        ranks: int = 1,
        mla: bool = False,
        layout: str = "LBHNC",
        spec: Any = None,
        windows: Sequence[int | None] = (None,) * LAYERS,
        house: Any = None,
        connector: dict[str, Any] | None = None,
        asynchronous: bool = False,
        second_runner: bool = False,
        policy: str = "recompute",
        scheduling: str = "fcfs",
        engine_id: str | None = None,
        with_workers: bool = True,
        only_rank: int | None = None,
        gpu: Any = None,
    ) -> None:
        """`room_bytes` are for slots; `options` are our configuration, `extra` the rest of
        `kv_connector_extra_config`. `windows` say for each layer how far back it looks. With
        `house`, the cache is that server's. With `gpu`, the pages are that device's.
        """
        self.house = house
        self.mla = mla
        self._numbers = range(ranks) if only_rank is None else [only_rank]
        self.finished: dict[str, str] = {}
        self.outputs: dict[str, list[int]] = {}
        self.params: dict[str, Any] = {}
        self.requests: dict[str, Request] = {}
        self.in_flight: deque[Any] = deque()
        self.steps: list[Any] = []
        """What the scheduling side told the workers, step by step."""
        self.asynchronous = asynchronous
        slab_bytes = CONTROL_BYTES + room_bytes
        settings = {"chunk_size": CHUNK, "max_local_cpu_size": slab_bytes / GIB, **(options or {})}
        transfer = {
            "kv_connector": "LMCacheConnectorV1",
            "kv_role": role,
            "kv_load_failure_policy": policy,
            "engine_id": engine_id or str(uuid.uuid4()),
            "kv_connector_extra_config": {
                **{f"lmcache.{key}": value for key, value in settings.items()},
                **(extra or {}),
            },
            **(connector or {}),  # instead of ours alone
        }
        if house:
            transfer["kv_connector"] = "LMCacheMPConnector"
            transfer["kv_connector_extra_config"] = {
                "lmcache.mp.port": int(house.endpoint.rpartition(":")[2]),
                "lmcache.mp.heartbeat_interval": 0.05,
                **{f"lmcache.{key}": value for key, value in (options or {}).items()},
                **(extra or {}),
            }
        self.config = config = copy.copy(base)
        config.model_config = copy.copy(base.model_config)
        if mla:
            config.model_config.__class__ = MLAModel
        config.cache_config = copy.copy(base.cache_config)
        config.cache_config.num_gpu_blocks = pages
        config.cache_config.num_gpu_blocks_override = pages
        config.cache_config.enable_prefix_caching = prefix_caching
        config.cache_config.kv_cache_layout = layout
        config.scheduler_config = copy.copy(base.scheduler_config)
        config.scheduler_config.max_num_batched_tokens = budget
        config.scheduler_config.async_scheduling = asynchronous
        config.scheduler_config.policy = scheduling
        config.scheduler_config.disable_hybrid_kv_cache_manager = house is None
        if gpu:
            config.device_config = DeviceConfig("cuda")
        config.parallel_config = copy.copy(base.parallel_config)
        config.parallel_config.tensor_parallel_size = ranks
        config.parallel_config.world_size = ranks
        config.kv_transfer_config = KVTransferConfig(**transfer)
        config.compilation_config = copy.copy(base.compilation_config)
        names = [f"model.layers.{i}.self_attn.attn" for i in range(len(windows))]
        config.compilation_config.static_forward_context = dict.fromkeys(names, Layer())
        specs = {
            name: spec or _spec(mla, window) for name, window in zip(names, windows, strict=True)
        }
        [self.kv_config] = get_kv_cache_configs(config, [specs], [1 << 30])
        groups = [
            [names.index(name) for name in group.layer_names]
            for group in self.kv_config.kv_cache_groups
        ]
        self.runner = Runner([], PAGE, groups)
        if gpu:
            self.runner.stream, self.runner.runs_ahead = gpu.stream, asynchronous
        self.runner.windows = [windows[layers[0]] for layers in groups]
        if with_workers:
            self.start_workers()
        scheduler_class = AsyncScheduler if asynchronous else Scheduler
        self.scheduler = scheduler_class(
            vllm_config=config,
            kv_cache_config=self.kv_config,
            structured_output_manager=StructuredOutputManager(config),
            block_size=PAGE,
            hash_block_size=PAGE,
        )
        self.scheduler.use_v2_model_runner = second_runner

    # ---- parts

    def start_workers(self) -> None:
        """What vLLM does in its workers before there is a scheduler."""
        for number in self._numbers:
            config = copy.copy(self.config)
            config.parallel_config = copy.copy(self.config.parallel_config)
            config.parallel_config.rank = number
            with set_current_vllm_config(config):
                connector = KVConnectorFactory.create_connector(
                    config, KVConnectorRole.WORKER, self.kv_config
                )
            layout = KVCacheLayout[self.config.cache_config.kv_cache_layout]
            kv_caches = allocate_kv_cache(self.kv_config, torch.device("cpu"), layout)
            rank = Rank(number, connector, kv_caches)
            rank.code_rank = 0 if self.mla else number
            self.runner.ranks.append(rank)
        for rank in self.runner.ranks:
            rank.connector.register_kv_caches(rank.kv_caches)

    @property
    def impl(self) -> Any:
        """Our connector where vLLM schedules."""
        return impl_of(self.scheduler.connector)

    @property
    def side(self) -> Any:
        return self.impl._scheduler

    @property
    def cache(self) -> Any:
        """What the scheduling side holds while it is attached, or None."""
        return self.side._joining.current()

    @property
    def decider(self) -> Any:
        return self.house.decider if self.house else self.cache.decider

    @property
    def counters(self) -> Any:
        return self.decider.counters

    @property
    def ranks(self) -> list[Rank]:
        return self.runner.ranks

    def wait_attached(self, attached: bool = True, timeout: float = 10.0) -> None:
        deadline = time.monotonic() + timeout
        while (self.cache is not None) != attached:
            assert time.monotonic() < deadline, f"attached is not {attached} after {timeout} s"
            time.sleep(0.01)

    # ---- requests

    def request(
        self,
        name: str,
        prompt: Sequence[int],
        *,
        max_tokens: int = 1,
        transfer: dict[str, Any] | None = None,
        sampling: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Request:
        """A request as vLLM's frontend would make it. `transfer` are its `kv_transfer_params`."""
        return Request(
            name,
            list(prompt),
            SamplingParams(
                max_tokens=max_tokens,
                ignore_eos=True,
                temperature=0.0,
                extra_args={"kv_transfer_params": transfer} if transfer is not None else None,
                **(sampling or {}),
            ),
            None,
            block_hasher=get_request_block_hasher(PAGE, sha256),
            **fields,
        )

    def add(self, name: str, prompt: Sequence[int], **options: Any) -> Request:
        """Submit a request; `options` are those of `request`."""
        request = self.request(name, prompt, **options)
        self.submit(request)
        return request

    def submit(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self.outputs[request.request_id] = []
        self.finished.pop(request.request_id, None)
        self.scheduler.add_request(request)

    def abort(self, name: str) -> None:
        """What a client does that hangs up."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.finished.setdefault(name, "abort")

    # ---- steps

    def schedule(self) -> Any:
        scheduled = self.scheduler.schedule()
        self.steps.append(step_in(scheduled.kv_connector_metadata))
        return scheduled

    def complete(self, scheduled: Any) -> None:
        """Execute a step and give vLLM its output."""
        output = self.runner.execute(scheduled)
        results = self.scheduler.update_from_output(scheduled, output)
        for result in itertools.chain.from_iterable(r.outputs for r in results.values()):
            self.outputs[result.request_id] += result.new_token_ids
            if result.finish_reason is not None:
                self.finished[result.request_id] = str(result.finish_reason)
                self.params[result.request_id] = result.kv_transfer_params

    def step(self) -> Any:
        """One step of the engine; with asynchronous scheduling the next one is scheduled first."""
        scheduled = self.schedule()
        if not self.asynchronous:
            self.complete(scheduled)
            return scheduled
        self.in_flight.append(scheduled)
        if len(self.in_flight) > 1:
            self.complete(self.in_flight.popleft())
        return scheduled

    def run(self, most: int = 500) -> int:
        """Step until every request has ended, and once more, as vLLM does; the steps it took."""
        for count in range(most):
            if not self.scheduler.requests:
                self.drain()
                return count
            if not self.step().total_num_scheduled_tokens:
                time.sleep(0.001)  # something is being fetched or loaded
        raise AssertionError(f"requests {list(self.scheduler.requests)} do not end")

    def drain(self) -> None:
        """Complete what is in flight, and let the scheduling side see that it has ended."""
        for _ in range(2):
            self.step()
        while self.in_flight:
            self.complete(self.in_flight.popleft())
        if self.asynchronous:
            self.complete(self.schedule())
            self.complete(self.schedule())

    def settle(self) -> None:
        """See that everything behind the engine has ended."""
        if self.runner.stream:
            self.runner.stream.synchronize()
        for rank in self.ranks:
            rank.side.stores._fence._pool.wait()
        self.step()
        self.drain()

    def generate(self, name: str, prompt: Sequence[int], **options: Any) -> int:
        """Run one request to its end; how many of its prompt tokens were loaded."""
        before = self.loaded
        self.add(name, prompt, **options)
        self.run()
        return self.loaded - before

    @property
    def loaded(self) -> int:
        """Tokens that all steps so far were told to load."""
        return sum(copy.tokens for step in self.steps for copy in step.loads)

    @property
    def stored(self) -> int:
        """Tokens that all steps so far were told to store."""
        return sum(copy.tokens for step in self.steps for copy in step.stores)

    # ---- afterwards

    def check_idle(self) -> None:
        """Nothing is held, everything can be freed."""
        assert not self.scheduler.requests
        assert not self.side._tracked
        assert not self.side._promises
        if self.house:
            self.house.wait_idle()
        if not self.cache or self.house:
            return
        decider = self.cache.decider
        assert [lease.owner for lease in decider.leases] == []
        assert len(self.cache.flights) == 0
        assert not decider._reserved
        self.cache.tiers.flush()
        decider.clear()
        assert decider.free_bytes == decider.capacity_bytes

    def check_text(self, *names: str, **shown: Any) -> None:
        """Outputs are as without a cache, and nobody read a wrong page unnoticed."""
        for name in names or self.finished:
            request, found = self.requests[name], self.outputs[name]
            assert WRONG_TOKEN not in found, name
            assert found == continuation(request.prompt_token_ids, len(found), **shown), name
        if self.house:
            assert not any(self.runner.wrong), "requests wait until their pages are there"
        self.runner.check_wrong(2 if self.asynchronous else 1)

    def close(self) -> None:
        self.impl.shutdown()
        for rank in self.ranks:
            rank.impl.shutdown()


def step_in(metadata: Any) -> Any:
    """Our part of what travels to the workers."""
    parts = getattr(metadata, "metadata", (metadata,))
    return next(part for part in parts if hasattr(part, "stores"))


def _spec(mla: bool, window: int | None) -> Any:
    if window is not None:
        return SlidingWindowSpec(
            block_size=PAGE,
            num_kv_heads=HEADS,
            head_size=HEAD_SIZE,
            dtype=torch.bfloat16,
            sliding_window=window,
        )
    if mla:
        return MLAAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)
    return FullAttentionSpec(
        block_size=PAGE, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.bfloat16
    )
