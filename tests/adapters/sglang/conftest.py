"""Contract tests of the SGLang adapter, on pools that are real tensors and without SGLang."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CORE = HERE.parents[1] / "core"

# tests belong to no package, so there is no name to import their helpers by
for name, folder in (("pool", HERE), ("rig", CORE), ("house", CORE)):
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    if name not in sys.modules:
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


@pytest.fixture
def later():
    """Calls what it is given in the end, the last first."""
    calls = []
    yield calls.append
    for call in reversed(calls):
        call()


@pytest.fixture
def errors():
    """The errors that were logged."""
    seen = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: seen.append(record.getMessage())
    logger = logging.getLogger("lmcache")
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)


@pytest.fixture
def settings(tmp_path):
    """Writes a configuration file and returns its path."""

    def settings(**keys):
        chosen = {"chunk_size": 16, "local_cpu": True, "max_local_cpu_size": 0.05, **keys}
        path = tmp_path / f"lmcache-{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text("".join(f"{key}: {value}\n" for key, value in chosen.items()))
        return str(path)

    return settings
