"""What a slower tier saves after a restart: the time to the first token, computed, from vLLM's own
prefix cache, and from the tier, once all processes were killed and started again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from service_costs import free_port
from vllm_costs import ENVIRONMENT, PROMPT_TOKENS, Answer, Engine, prompts_of

WARM_UP = 2
PROMPTS = 8
WAIT_S = 60
VLLM_FILES = "vllm+file"
PAGE_TOKENS = 128
"""Of vLLM on a CPU, and its own tier keeps a file for each page."""
MEMORY = 1 << 30


class Served(ABC):
    """An engine, and what keeps its KV: may be killed and started again."""

    engine: Engine

    def __init__(self, model: str) -> None:
        self._model = model
        self._running = contextlib.ExitStack()

    @abstractmethod
    def start(self) -> None:
        """Return when it is ready."""

    def kill(self) -> None:
        """All of it, as a crash would."""
        self._running.close()

    @abstractmethod
    def has_written(self) -> bool:
        """Whether the tier has all that was computed."""

    def wait(self, condition: Any) -> None:
        """Until it holds; what does not answer does not hold."""
        deadline = time.monotonic() + WAIT_S
        while True:
            with contextlib.suppress(OSError):
                if condition():
                    return
            assert time.monotonic() < deadline, f"{condition.__name__} never happened"
            time.sleep(0.05)

    def _start_engine(self, connector: str, keys: dict[str, Any], **others: str) -> None:
        transfer = {"kv_connector": connector, "kv_role": "kv_both", **others}
        self.engine = Engine(self._model, {**transfer, "kv_connector_extra_config": keys})
        self._running.callback(self.engine.kill)


class Lmcache(Served):
    """`lmcache server` with one tier and an engine, at the same ports whenever it is started."""

    def __init__(self, model: str, tier: str) -> None:
        super().__init__(model)
        self._port, self._http = free_port(), free_port()
        ports = ["--port", str(self._port), "--http-port", str(self._http)]
        self._command = [sys.executable, "-m", "lmcache", "server", *ports]
        self._command += ["--l1-size-gb", str(MEMORY >> 30), "--l2", tier]

    def start(self) -> None:
        self._server = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        self._running.callback(self._server.wait)
        self._running.callback(self._server.kill)
        self.wait(self._is_ready)
        keys = {"lmcache.mp.port": self._port, "lmcache.mp.heartbeat_interval": 0.2}
        self._start_engine("LMCacheMPConnector", keys)
        self.wait(self._has_engine)

    def has_written(self) -> bool:
        assert not self._sum("tier_dropped"), "the tier has no room for all of it, or failed"
        chunks: int = json.loads(self._get("status"))["l1"]["chunks"]
        return 0 < chunks <= self._sum("tier_written")

    def _is_ready(self) -> bool:
        assert self._server.poll() is None, "the server has ended"
        return bool(self._get("readyz"))

    def _has_engine(self) -> bool:
        return bool(json.loads(self._get("status"))["engines"])

    def _sum(self, counter: str) -> float:
        pattern = rf"^lmcache_{counter}_total(?:{{.*}})? (\S+)$".encode()
        return sum(map(float, re.findall(pattern, self._get("metrics"), re.MULTILINE)))

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._http}/{path}", timeout=5) as page:
            body: bytes = page.read()
            return body


class VllmFiles(Served):
    """An engine with vLLM's own offloading to memory and from there to files."""

    def __init__(self, model: str, folder: str) -> None:
        super().__init__(model)
        self._folder = Path(folder)
        self._id = f"lmcache-bench-{os.getpid()}"

    def start(self) -> None:
        # vLLM unlinks it only when it ends in peace
        memory = Path(f"/dev/shm/vllm_offload_{self._id}.mmap")
        self._running.callback(memory.unlink, missing_ok=True)
        keys = {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "vllm_files",
            "cpu_bytes_to_use": MEMORY,
            "secondary_tiers": [{"type": "fs", "root_dir": str(self._folder)}],
        }
        self._start_engine("OffloadingConnector", keys, engine_id=self._id)

    def has_written(self) -> bool:
        pages = (WARM_UP + PROMPTS) * (PROMPT_TOKENS // PAGE_TOKENS)
        return len(list(self._folder.rglob("*.bin"))) >= pages


def run(model: str, tiers: list[str]) -> dict[str, Any]:
    """Figures of each tier, by the scheme of its URL: without any, files, ours and vLLM's own."""
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder:
        ours = f"file://{folder}/lmcache?max_size=4GB"
        urls = tiers or [ours, f"{VLLM_FILES}://{folder}/vllm"]
        return _measure({url.partition("://")[0]: _served(model, url) for url in urls})


def _served(model: str, url: str) -> Served:
    scheme, _, folder = url.partition("://")
    return VllmFiles(model, folder) if scheme == VLLM_FILES else Lmcache(model, url)


def _measure(tiers: dict[str, Served]) -> dict[str, Any]:
    prompts = prompts_of(os.getpid(), WARM_UP + PROMPTS)  # a store may have those of an earlier run
    with contextlib.ExitStack() as killed:
        for tier in tiers.values():
            killed.callback(tier.kill)
            tier.start()
        cold, own = _ask(tiers, prompts), _ask(tiers, prompts)
        for tier in tiers.values():
            tier.wait(tier.has_written)
            tier.kill()
            tier.start()
        after = _ask(tiers, prompts)
    return {name: _figures(cold[name], own[name], after[name]) for name in tiers}


def _ask(tiers: dict[str, Served], prompts: list[list[int]]) -> dict[str, list[Answer]]:
    """Each prompt of each tier's engine in turn, for the machine's speed drifts."""
    answers = [{name: t.engine.ask(prompt) for name, t in tiers.items()} for prompt in prompts]
    return {name: [answer[name] for answer in answers[WARM_UP:]] for name in tiers}


def _figures(cold: list[Answer], own: list[Answer], after: list[Answer]) -> dict[str, float]:
    assert not any(answer.cached for answer in cold), "nobody has asked this before"
    assert min(answer.cached for answer in own) > PROMPT_TOKENS * 0.9, "all must be hits"
    assert [a.cached for a in own] == [a.cached for a in after], "both must have the same tokens"
    # not those of `cold`: bfloat16 may choose another where as many tokens are computed at once
    assert [a.tokens for a in own] == [a.tokens for a in after], "a hit must not change the answer"
    times = {"cold": cold, "prefix_hit": own, "restart": after}
    said = {f"{k}_ms": statistics.median(a.seconds for a in v) * 1e3 for k, v in times.items()}
    return {**said, "cold_over_restart": said["cold_ms"] / said["restart_ms"]}
