"""With the real TensorRT-LLM and a GPU, for who has them: `MODEL` may name a model of yours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_llm")
pytestmark = pytest.mark.engine

HERE = Path(__file__).resolve().parent
MODEL = os.environ.get("MODEL", "Qwen/Qwen2-1.5B-Instruct")


@pytest.mark.parametrize("preset", ["lmcache", "lmcache-mp"])
def test_a_prompt_that_the_engine_has_forgotten(preset, server):
    """In a process of its own, as it takes all of the GPU."""
    env = {
        **os.environ,
        "LMCACHE_CHUNK_SIZE": "64",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "1",
        "LMCACHE_SERVER_URL": f"tcp://127.0.0.1:{server.port}",
        "LMCACHE_LOG_LEVEL": "INFO",
        "TLLM_WORKER_USE_SINGLE_PROCESS": "1",
    }
    if preset == "lmcache-mp":
        del env["LMCACHE_MAX_LOCAL_CPU_SIZE"]
    done = subprocess.run(
        [sys.executable, HERE / "scripts/real.py", preset, MODEL],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, filler, again = done.stdout.splitlines()[-3:]
    assert again == first != filler
    assert "Retrieved" in done.stderr + done.stdout
