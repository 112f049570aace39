"""What a slower tier saves after a restart: the time to the first token, computed, from vLLM's own
prefix cache, and from the tier, once the server was killed and started again.
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
from typing import Any

from service_costs import free_port
from vllm_costs import ENVIRONMENT, PROMPT_TOKENS, Engine, prompts_of

PROMPTS = 4
WAIT_S = 60


class Server:
    """`lmcache server` with one tier, at the same ports whenever it is started."""

    def __init__(self, tier: str) -> None:
        self.port, self._http = free_port(), free_port()
        ports = ["--port", str(self.port), "--http-port", str(self._http)]
        self._command = [sys.executable, "-m", "lmcache", "server", *ports]
        self._command += ["--l1-size-gb", "2", "--l2", tier]
        self.start()

    def start(self) -> None:
        """Return when it is ready."""
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        self.wait(lambda: self._get("readyz"))

    def kill(self) -> None:
        """As a crash would."""
        self._process.kill()
        self._process.wait()

    def wait(self, condition: Any) -> None:
        """Until it holds; a server that does not answer does not."""
        deadline = time.monotonic() + WAIT_S
        while True:
            with contextlib.suppress(OSError):
                if condition():
                    return
            assert self._process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "it never happened"
            time.sleep(0.05)

    def has_engines(self) -> bool:
        return bool(json.loads(self._get("status"))["engines"])

    def has_written(self) -> bool:
        """Whether the tier has all that memory has."""
        chunks = json.loads(self._get("status"))["l1"]["chunks"]
        pattern = rb"^lmcache_tier_written_total\{.*\} (\S+)$"
        found = re.findall(pattern, self._get("metrics"), re.MULTILINE)
        return 0 < chunks <= sum(map(float, found))

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._http}/{path}", timeout=5) as page:
            body: bytes = page.read()
            return body


def run(model: str, tiers: list[str]) -> dict[str, Any]:
    """Figures of each tier, by the scheme of its URL; files in a folder of their own by default."""
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder:
        urls = tiers or [f"file://{folder}/tier?max_size=4GB"]
        return {url.partition("://")[0]: _measure(model, url) for url in urls}


def _measure(model: str, url: str) -> dict[str, float]:
    server = Server(url)
    keys = {"lmcache.mp.port": server.port, "lmcache.mp.heartbeat_interval": 0.2}
    transfer = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both"}
    engine = Engine(model, {**transfer, "kv_connector_extra_config": keys})
    try:
        server.wait(server.has_engines)
        for prompt in prompts_of(0, 2):
            engine.ask(prompt)
        prompts = prompts_of(os.getpid(), PROMPTS)  # a store may have those of an earlier run
        cold = [engine.ask(prompt) for prompt in prompts]
        own = [engine.ask(prompt) for prompt in prompts]
        server.wait(server.has_written)
        server.kill()
        server.start()
        server.wait(server.has_engines)
        engine.reset()
        after = [engine.ask(prompt) for prompt in prompts]
    finally:
        engine.close()
        server.kill()
    assert not any(answer.cached for answer in cold), "nobody has asked this before"
    assert min(answer.cached for answer in own + after) > PROMPT_TOKENS * 0.9, "all must be hits"
    assert [a.tokens for a in cold] == [a.tokens for a in after], "a hit must not change the answer"
    times = {"cold": cold, "prefix_hit": own, "restart": after}
    said = {f"{k}_ms": statistics.median(a.seconds for a in v) * 1e3 for k, v in times.items()}
    return {**said, "cold_over_restart": said["cold_ms"] / said["restart_ms"]}
