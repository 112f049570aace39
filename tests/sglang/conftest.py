"""Fixtures for tests that run a real SGLang; `sgl.py` tells what that costs.

@pytest.fixture(scope="module")
def server(start_sglang):
    with start_sglang("0.5.23", page=16, env={"LMCACHE_CHUNK_SIZE": "16"}) as server:
        yield server
"""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent

# tests belong to no package, so there is no name to import their helpers by
for name in ("group", "launch", "sgl"):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
for name in ("harness", "served"):
    spec = importlib.util.spec_from_file_location(name, HERE.parent / "engines" / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
launch, sgl = sys.modules["launch"], sys.modules["sgl"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What an SGLang said last is part of a failure."""
    report = yield
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(server, sgl.Sglang):
        report.sections.append(("SGLang", server.tail()))
    return report


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 2.6 million parameters, as a checkpoint folder; skips where there is no SGLang."""
    if not launch.PYTHON.exists():
        pytest.skip("SGLang is not installed, see scripts/setup.sh")
    folder = tmp_path_factory.mktemp("tiny")
    subprocess.run([launch.PYTHON, HERE / "tiny_model.py", folder], check=True)
    return folder


@pytest.fixture(scope="session")
def start_sglang(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Starts a `sgl.Sglang` of a version on the tiny model."""
    folder = tmp_path_factory.mktemp("sglang")
    numbers = itertools.count()

    def start(version: str, **options: Any) -> Any:
        log = folder / f"{next(numbers)}.log"
        return sgl.Sglang(version, log, **{"model": tiny_model, **options})

    return start


@pytest.fixture(scope="session")
def start_vllm(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Starts a `harness.Engine` on the tiny model."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    folder = tmp_path_factory.mktemp("vllm")
    numbers = itertools.count()

    def start(*, env: dict[str, str] | None = None, **engine_args: Any) -> Any:
        log = folder / f"{next(numbers)}.log"
        arguments = {"model": str(tiny_model), "max_model_len": 4096, **engine_args}
        return sys.modules["harness"].Engine(arguments, log=log, env=env)

    return start


@pytest.fixture(scope="module")
def start_lmcache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Starts servers of ours, and stops them in the end."""
    folder, started = tmp_path_factory.mktemp("lmcache"), []

    def start(*options: str) -> Any:
        server = sys.modules["served"].Server(folder / f"{len(started)}.log", *options)
        started.append(server)
        return server.start()

    yield start
    for server in started:
        server.stop()
