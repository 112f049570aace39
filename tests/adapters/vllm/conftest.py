"""Contract tests of the vLLM adapter, on vLLM's own scheduler and wrapper without a model.

`rig.Engine` is the engine; `codes` says what its fake model writes into pages that are real
tensors,
and `runner` calls the connector in the order of vLLM's model runners. They need an installed vLLM.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lmcache.core.decider import Decider
from lmcache.core.eviction.lru import LRUPolicy
from lmcache.core.slab import CONTROL_BYTES, Slab
from lmcache.core.tier import Tier
from lmcache.core.tiers import Tiers

HERE = Path(__file__).resolve().parent


def load(name: str, folder: Path = HERE) -> ModuleType:
    """Import a helper of a test folder, which belongs to no package, as `fake_<name>`."""
    full = f"fake_{name}"
    spec = importlib.util.spec_from_file_location(full, folder / f"{name}.py")
    module = sys.modules[full] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def rig() -> ModuleType:
    """The helpers, once vLLM is imported; its imports warn of what it has deprecated itself."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load("codes")
        load("runner")
        load("other")
        load("lazy", HERE.parents[1] / "kernels")
        load("gpu")
        return load("rig")


@pytest.fixture(scope="session")
def base_config(rig: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rig.make_base_config(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_engine(rig: ModuleType, base_config: Any) -> Iterator[Callable[..., Any]]:
    """Makes a `rig.Engine` from its options; all are closed after the test."""
    engines = []

    def make(**options: Any) -> Any:
        engines.append(rig.Engine(base_config, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def on_gpu(
    rig: ModuleType, make_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Makes engines whose pages are on a GPU that does everything as late as it may."""

    def make(seed: object, **options: Any) -> Any:
        gpu = sys.modules["fake_gpu"].Gpu(str(seed))
        monkeypatch.setattr("lmcache.core.grants.copier_for", gpu.copier_for)
        return make_engine(gpu=gpu, **options)

    return make


@pytest.fixture
def make_house() -> Iterator[Callable[..., Any]]:
    """Makes a server with room for so many bytes of slots, and tiers; all end with the test."""
    house = load("house", HERE.parents[1] / "core")
    made = []

    def make(room_bytes: int = 4 << 20, *backends: Any, **terms: Any) -> Any:
        slab = Slab.create(CONTROL_BYTES + room_bytes)
        decider = Decider(slab, LRUPolicy())
        named = [Tier(f"t{index}", backend) for index, backend in enumerate(backends)]
        tiers = Tiers(decider, named, fetch_timeout_s=terms.get("fetch_timeout_s", 2.0))
        made.append((house.House(decider, tiers, **{"chunk_size": 16, **terms}), tiers, slab))
        return made[-1][0]

    yield make
    for running, tiers, slab in made:
        running.close()
        tiers.close()
        slab.close()


@pytest.fixture
def engine(make_engine: Callable[..., Any]) -> Any:
    return make_engine()


@pytest.fixture
def full_engine(make_engine: Callable[..., Any]) -> Any:
    """An engine with no room for another request, that has been asked to serve `waiting` too."""
    engine = make_engine(pages=66)
    engine.generate("cold", range(100))
    engine.add("big", range(300, 500), max_tokens=12)
    for _ in range(4):
        engine.step()
    engine.add("waiting", range(100))
    return engine


class Lines(logging.Handler):
    """The connector's log lines."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def about(self, text: str) -> list[str]:
        """Messages that contain `text`."""
        return [m for record in self.records if text in (m := record.getMessage())]

    @property
    def errors(self) -> list[str]:
        return [r.getMessage() for r in self.records if r.levelno >= logging.ERROR]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What LMCache logs during the test."""
    handler = Lines()
    logger = logging.getLogger("lmcache")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
