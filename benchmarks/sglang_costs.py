"""What a hit saves in a real SGLang on a CPU: times to the first token, in turn.

`scripts/setup.sh test` installs the versions; the tests' own rig starts them.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service_costs import OURS, served

TESTS = Path(__file__).resolve().parents[1] / "tests"
PROMPT_TOKENS = 2_100
VOCABULARY = 40_000
ROUNDS = 6
POOL_TOKENS = 40_000
CHUNK = 256
IN_PROCESS = f"chunk_size: {CHUNK}\nlocal_cpu: true\nmax_local_cpu_size: 2\n"


@contextmanager
def _in_process(model: str, folder: Path, *, layerwise: bool) -> Iterator[Any]:
    from sgl import Sglang

    file = folder / "lmcache.yaml"
    file.write_text(f"{IN_PROCESS}use_layerwise: {str(layerwise).lower()}\n")
    server = Sglang(
        "0.5.9",
        folder / "sglang.log",
        model=model,
        pool_tokens=POOL_TOKENS,
        env={"LMCACHE_CONFIG_FILE": str(file)},
    )
    try:
        yield server
    finally:
        server.kill()  # this version waits for what it has locked


@contextmanager
def _with_server(model: str, folder: Path) -> Iterator[Any]:
    from sgl import Sglang

    file = folder / "lmcache.yaml"
    with served(OURS, "--l1-size-gb", "2", "--chunk-size", str(CHUNK)) as (port, _):
        file.write_text(f"mp_host: 127.0.0.1\nmp_port: {port}\n")
        with Sglang(
            "0.5.23",
            folder / "sglang.log",
            model=model,
            pool_tokens=POOL_TOKENS,
            config_file=file,
        ) as server:
            yield server


def _ask(server: Any, prompt: list[int], expected: int) -> float:
    """Milliseconds to the first token, of which `expected` tokens were not computed."""
    started = time.perf_counter()
    answer = server.generate(prompt, 1)
    spent = (time.perf_counter() - started) * 1e3
    assert answer.cached_tokens == expected, f"{answer.cached_tokens} tokens, not {expected}"
    return spent


def _turns(server: Any) -> dict[str, float]:
    """Medians: computed, found in SGLang's radix tree, loaded from LMCache."""
    rng = random.Random(7)
    cold, radix, loaded = [], [], []
    for turn in range(ROUNDS + 1):
        prompt = rng.choices(range(VOCABULARY), k=PROMPT_TOKENS)
        times = [_ask(server, prompt, 0), _ask(server, prompt, PROMPT_TOKENS - 1)]
        server.flush()
        times.append(_ask(server, prompt, PROMPT_TOKENS // CHUNK * CHUNK))
        server.flush()
        if turn:  # the first warms the processes up
            for kept, spent in zip((cold, radix, loaded), times, strict=True):
                kept.append(spent)
    said = {
        "cold_ms": statistics.median(cold),
        "radix_ms": statistics.median(radix),
        "lmcache_ms": statistics.median(loaded),
    }
    return {**said, "cold_over_lmcache": said["cold_ms"] / said["lmcache_ms"]}


def run(model: str) -> dict[str, Any]:
    """For each way in which SGLang calls us."""
    sys.path += [str(TESTS), str(TESTS / "sglang")]
    ways = {
        "0.5.9, layer by layer": lambda folder: _in_process(model, folder, layerwise=True),
        "0.5.9, whole prompts": lambda folder: _in_process(model, folder, layerwise=False),
        "0.5.23, with a server": lambda folder: _with_server(model, folder),
    }
    figures = {}
    for name, way in ways.items():
        with tempfile.TemporaryDirectory() as folder, way(Path(folder)) as server:
            figures[name] = _turns(server)
    return figures
