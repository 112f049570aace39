"""What the connector costs and saves in a real vLLM, as ratios of requests that take turns.

Two engines run side by side, each in a process of its own; only one computes at a time, and what is
compared alternates, so that a machine whose speed drifts slows both sides of every ratio.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PROMPT_TOKENS = 2_200
ROUNDS = 8


@dataclass(frozen=True)
class Answer:
    """One request, answered."""

    seconds: float
    tokens: list[int]
    cached: int


class Engine:
    """vLLM's offline engine in a child process."""

    def __init__(self, model: str, *, lmcache: bool, env: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        options = {"model": model, "lmcache": lmcache, "env": env}
        self._process = context.Process(target=_serve, args=(theirs, options), daemon=True)
        self._process.start()
        self._pipe.recv()

    def ask(self, prompt: list[int], max_tokens: int = 1) -> Answer:
        """Time one request; with one token to make, that is the time to the first token."""
        self._pipe.send(("ask", prompt, max_tokens))
        answer: Answer = self._pipe.recv()
        return answer

    def reset(self) -> None:
        """Empty vLLM's own prefix cache."""
        self._pipe.send(("reset",))
        self._pipe.recv()

    def close(self) -> None:
        """End the engine."""
        self._pipe.send(None)
        self._process.join(30)
        self._process.kill()


def _serve(pipe: Connection, options: dict[str, Any]) -> None:
    os.environ.update(options["env"])
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both")
    llm = LLM(
        model=options["model"],
        max_model_len=4096,
        enforce_eager=True,
        enable_prefix_caching=True,
        kv_transfer_config=transfer if options["lmcache"] else None,
    )
    pipe.send("ready")
    while call := pipe.recv():
        if call[0] == "reset":
            llm.reset_prefix_cache()
            pipe.send(None)
            continue
        params = SamplingParams(temperature=0, max_tokens=call[2], ignore_eos=True)
        begun = time.perf_counter()
        [output] = llm.generate({"prompt_token_ids": call[1]}, params, use_tqdm=False)
        spent = time.perf_counter() - begun
        pipe.send(Answer(spent, list(output.outputs[0].token_ids), output.num_cached_tokens))


def _prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1_000, 40_000) for _ in range(PROMPT_TOKENS)] for _ in range(ROUNDS)]


def run(model: str) -> dict[str, Any]:
    """All figures; takes some minutes on a small machine."""
    env = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "LMCACHE_LOG_LEVEL": "WARNING",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "2",
    }
    cached = Engine(model, lmcache=True, env=env)
    plain = Engine(model, lmcache=False, env=env)
    try:
        for engine in (cached, plain):
            for prompt in _prompts(0)[:2]:
                engine.ask(prompt)
        return {"misses": _misses(cached, plain), "hits": _hits(cached, plain)}
    finally:
        cached.close()
        plain.close()


def _misses(cached: Engine, plain: Engine) -> dict[str, float]:
    """Requests that share nothing, prefill and some decoding, with and without the connector."""
    ratios, seconds = [], []
    for number, prompt in enumerate(_prompts(1)):
        order = (cached, plain) if number % 2 else (plain, cached)
        spent = {engine: engine.ask(prompt, max_tokens=16).seconds for engine in order}
        ratios.append(spent[cached] / spent[plain])
        seconds.append(spent[plain])
    return {
        "plain_ms": statistics.median(seconds) * 1e3,
        "overhead_percent": (statistics.median(ratios) - 1) * 100,
        "overhead_percent_lowest": (min(ratios) - 1) * 100,
        "overhead_percent_highest": (max(ratios) - 1) * 100,
    }


def _hits(cached: Engine, plain: Engine) -> dict[str, float]:
    """The same prompt from our slab and from vLLM's own prefix cache."""
    ratios, ours, own, cold = [], [], [], []
    for prompt in _prompts(2):
        cold.append(plain.ask(prompt).seconds)
        cached.ask(prompt)
        pairs = []
        for _ in range(3):
            cached.reset()
            warm, hit = cached.ask(prompt), plain.ask(prompt)
            assert warm.cached == hit.cached > 0, "both must have the same tokens"
            assert warm.tokens == hit.tokens, "a hit must not change the answer"
            pairs.append((warm.seconds, hit.seconds))
        ours += [warm for warm, _ in pairs]
        own += [hit for _, hit in pairs]
        ratios += [warm / hit for warm, hit in pairs]
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "cold_ms": statistics.median(cold) * 1e3,
        "warm_ms": statistics.median(ours) * 1e3,
        "prefix_hit_ms": statistics.median(own) * 1e3,
        "warm_over_prefix_hit": statistics.median(ratios),
        "cold_over_warm": statistics.median(cold) / statistics.median(ours),
    }
