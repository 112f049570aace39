"""What the connector costs and saves in a real vLLM, as ratios of requests that take turns.

Two engines run side by side, each in a process of its own; only one computes at a time, and what is
compared alternates, so that a machine whose speed drifts slows both sides of every ratio.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

PROMPT_TOKENS = 2_200
PAIRS = 4
"""Two processes with the same engine can differ by more than what is measured here."""
MISSES = 24
HITS = 3
WARM_UP = 6
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "LMCACHE_LOG_LEVEL": "WARNING",
    "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.25",  # soon full: from then on every store evicts
    # else glibc decides by each process's history which tensors cost page faults
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
}


IN_PROCESS = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}


@dataclass(frozen=True)
class Answer:
    """One request, answered."""

    seconds: float
    hooks: float
    """Seconds of them spent in the connector."""
    tokens: list[int]
    cached: int


class Engine:
    """vLLM's offline engine in a child process."""

    def __init__(self, model: str, transfer: dict[str, Any] | None) -> None:
        """`transfer` is vLLM's `--kv-transfer-config`."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, model, transfer), daemon=True)
        self._process.start()
        self._pipe.recv()

    def ask(self, prompt: list[int], max_tokens: int = 1) -> Answer:
        """Time one request; with one token to make, that is the time to the first token."""
        self._pipe.send(("ask", prompt, max_tokens))
        answer: Answer = self._pipe.recv()
        return answer

    def switch(self, *, connector: bool) -> None:
        """Have vLLM use the connector it was started with, or do as if there were none."""
        self._pipe.send(("switch", connector))
        self._pipe.recv()

    def reset(self) -> None:
        """Empty vLLM's own prefix cache."""
        self._pipe.send(("reset",))
        self._pipe.recv()

    def close(self) -> None:
        """End the engine."""
        self._pipe.send(None)
        self._process.join(30)
        self._process.kill()

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()
        self._process.join()


def _time_hooks() -> list[float]:
    """Have every hook of the connector add its seconds to the list's only element."""
    from lmcache.integration.vllm.vllm_v1_adapter import LMCacheConnectorV1Impl as Connector

    spent = [0.0]

    def timed(hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                spent[0] += time.perf_counter() - begun

        return call

    for name, member in list(vars(Connector).items()):
        if callable(member) and not name.startswith("_"):
            setattr(Connector, name, timed(member))
    return spent


def _serve(pipe: Connection, model: str, transfer: dict[str, Any] | None) -> None:
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer import kv_transfer_state

    hooks = _time_hooks() if transfer == IN_PROCESS else [0.0]
    llm = LLM(
        model=model,
        max_model_len=4096,
        enforce_eager=True,
        enable_prefix_caching=True,
        kv_transfer_config=KVTransferConfig(**transfer) if transfer else None,
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    used = scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT
    pipe.send("ready")
    while call := pipe.recv():
        if call[0] == "switch":
            scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT = (
                used if call[1] else (None, None)
            )
            pipe.send(None)
            continue
        if call[0] == "reset":
            llm.reset_prefix_cache()
            pipe.send(None)
            continue
        params = SamplingParams(temperature=0, max_tokens=call[2], ignore_eos=True)
        hooks[0] = 0.0
        begun = time.perf_counter()
        [output] = llm.generate({"prompt_token_ids": call[1]}, params, use_tqdm=False)
        spent = time.perf_counter() - begun
        tokens = list(output.outputs[0].token_ids)
        pipe.send(Answer(spent, hooks[0], tokens, output.num_cached_tokens))


def prompts_of(seed: int, count: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1_000, 40_000) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def run(model: str) -> dict[str, Any]:
    """All figures; takes some minutes on a small machine."""
    os.environ.update(ENVIRONMENT)
    both = [_pair(model, number) for number in range(PAIRS)]
    misses = [miss for misses, _ in both for miss in misses]
    hits = [hit for _, hits in both for hit in hits]
    cold, ours, own = (statistics.median(times) * 1e3 for times in zip(*hits, strict=True))
    return {
        "misses": {
            "hooks_percent": statistics.median(share for _, share in misses) * 100,
            "overhead_percent": _percent(misses),
            "quartiles": dict(zip(("lower", "upper"), _quartiles(misses), strict=True)),
            "by_pair_of_engines": {str(i): _percent(misses) for i, (misses, _) in enumerate(both)},
        },
        "hits": {
            "prompt_tokens": PROMPT_TOKENS,
            "cold_ms": cold,
            "warm_ms": ours,
            "prefix_hit_ms": own,
            "warm_over_prefix_hit": statistics.median(w / h for _, w, h in hits),
            "cold_over_warm": cold / ours,
        },
    }


def _percent(misses: list[tuple[float, float]]) -> float:
    return (statistics.median(ratio for ratio, _ in misses) - 1) * 100


def _quartiles(misses: list[tuple[float, float]]) -> tuple[float, float]:
    lower, _, upper = statistics.quantiles(ratio for ratio, _ in misses)
    return (lower - 1) * 100, (upper - 1) * 100


def _pair(
    model: str, number: int
) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """What `_misses` and `_hits` say of two fresh engines, started in alternate order."""
    engines = {}
    try:
        for lmcache in (True, False) if number % 2 else (False, True):
            engines[lmcache] = Engine(model, IN_PROCESS if lmcache else None)
            for prompt in prompts_of(0, WARM_UP):
                engines[lmcache].ask(prompt)
        cached, plain = engines[True], engines[False]
        return _misses(cached, number), _hits(cached, plain, number)
    finally:
        for engine in engines.values():
            engine.close()


def _misses(engine: Engine, seed: int) -> list[tuple[float, float]]:
    """Requests that share nothing: seconds with us over without, and our hooks' share of them.

    In one process, whose connector is switched on and off: two would differ by more than it costs.
    """
    ratios = []
    prompts = prompts_of(10 + seed, 2 * MISSES)
    for number in range(MISSES):
        answers = {}
        for connector in (True, False) if number % 2 else (False, True):
            engine.switch(connector=connector)
            answers[connector] = engine.ask(prompts.pop(), max_tokens=16)
        assert answers[True].hooks > 0 == answers[False].hooks, "the switch must switch"
        ours, theirs = answers[True], answers[False]
        ratios.append((ours.seconds / theirs.seconds, ours.hooks / ours.seconds))
    engine.switch(connector=True)
    return ratios


def _hits(cached: Engine, plain: Engine, seed: int) -> list[tuple[float, float, float]]:
    """Seconds of a prompt computed, from our slab, and from vLLM's own prefix cache."""
    times = []
    for prompt in prompts_of(20 + seed, HITS):
        cold = plain.ask(prompt).seconds
        cached.ask(prompt)
        for _ in range(3):
            cached.reset()
            warm, hit = cached.ask(prompt), plain.ask(prompt)
            assert warm.cached == hit.cached > 0, "both must have the same tokens"
            assert warm.tokens == hit.tokens, "a hit must not change the answer"
            times.append((cold, warm.seconds, hit.seconds))
    return times
