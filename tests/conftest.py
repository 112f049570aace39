"""What every test gets: its environment is clean, and it fails if it leaves something behind."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def _helper(name: str) -> Any:
    """A module beside this one: tests belong to no package, so there is no name to import it by."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_helper("ports")
_helper("redis_server")
_helper("s3_server")
_helper("mooncake_server")

PATIENCE_S = 5.0
"""How long a thread may take to end after the test that began it."""

NOT_OURS = ("CUDA_", "KMP_", "OMP_", "PYTEST_", "TOKENIZERS_", "TORCH", "TRITON_", "VLLM_")
"""Beginnings of variables that pytest, torch and engines set for themselves when imported."""


@pytest.fixture(autouse=True, scope="session")
def a_clean_environment() -> Iterator[None]:
    """No configuration of LMCache from the shell that runs the tests, but for the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("LMCACHE_") and not name.startswith("LMCACHE_TEST_"):
                patch.delenv(name)
        yield


@pytest.fixture(autouse=True)
def no_environment_variable_stays(a_clean_environment: None) -> Iterator[None]:
    before = dict(os.environ)
    yield
    changed = sorted(
        name
        for name, _ in set(before.items()) ^ set(os.environ.items())
        if not name.startswith(NOT_OURS)
    )
    for name in changed:  # or every test after this one would fail as well
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]
    assert not changed, f"the test changed environment variables and left them so: {changed}"


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    new = [t for t in threading.enumerate() if t not in before and t.name.startswith("lmcache-")]
    deadline = time.monotonic() + PATIENCE_S
    for thread in new:
        thread.join(max(0.0, deadline - time.monotonic()))
    left = sorted(thread.name for thread in new if thread.is_alive())
    assert not left, f"the test left threads running; something was not closed: {left}"


@pytest.fixture
def new_redis(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts a `RedisServer` with the given options of redis-server, each time it is called."""
    servers: list[Any] = []

    def new_redis(*options: str) -> Any:
        servers.append(sys.modules["redis_server"].RedisServer(tmp_path, *options))
        return servers[-1]

    yield new_redis
    for server in servers:
        server.kill()
