"""A stand-in for TensorRT-LLM, an executor that drives connectors, and what both agree on."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from pathlib import Path

import pytest

from lmcache.core.log import init_logger

HERE = str(Path(__file__).resolve().parent)

# tests belong to no package, and a connector must be importable by its name as TensorRT-LLM does it
if HERE not in sys.path:
    sys.path.insert(0, HERE)

ENGINES = Path(HERE).parent / "engines"
for name in ("harness", "served"):
    spec = importlib.util.spec_from_file_location(name, ENGINES / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])

pytest.register_assert_rewrite("suite")
standin = importlib.import_module("standin")


@pytest.fixture(params=standin.PROFILES)
def profile(request):
    """Each version of TensorRT-LLM in turn, as the only one there is."""
    with standin.installed(request.param) as profile:
        yield profile


@pytest.fixture
def main_v2():
    with standin.installed("main_v2") as profile:
        yield profile


@pytest.fixture
def choose(profile):
    """Sets choices of the minimal connector, which the broken ones share."""

    def choose(**choices):
        minimal = importlib.import_module("minimal")
        vars(minimal.CHOICES).update(choices)
        return minimal

    return choose


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of ours."""
    log = tmp_path_factory.mktemp("lmcache") / "server.log"
    server = sys.modules["served"].Server(log, "--l1-size-gb", "0.2", "--chunk-size", "64")
    yield server.start()
    server.stop()


@pytest.fixture
def heard(caplog, monkeypatch):
    """What we log."""
    init_logger("lmcache")  # or whoever comes first sets it up anew
    monkeypatch.setattr(logging.getLogger("lmcache"), "propagate", True)
    return caplog
