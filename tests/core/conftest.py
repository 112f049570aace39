"""A rig for the core's tests, and a look at what they leave behind."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import sys
from pathlib import Path

import hypothesis
import pytest

HERE = Path(__file__).resolve().parent

# tests belong to no package, so there is no name to import their helpers by
for name in ("rig", "house"):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])

# how long an example takes depends on what else the machine does
hypothesis.settings.register_profile("core", deadline=None)
hypothesis.settings.load_profile("core")


@pytest.fixture
def workshop():
    """Makes deciders, tiers, movers and engines, and closes them after the test."""
    made = sys.modules["rig"].Workshop()
    yield made
    made.close()


@pytest.fixture
def warnings():
    """What is logged as a warning or worse, while the test runs."""
    messages = []

    class Handler(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logging.getLogger("lmcache").addHandler(handler)
    yield messages
    logging.getLogger("lmcache").removeHandler(handler)


def descriptors():
    """Our slabs and sockets that are open in this process."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if "lmcache" in target or target.startswith("socket:"):
            found.append(f"{name}: {target}")
    return found


@pytest.fixture(autouse=True)
def no_descriptor_stays(caplog):
    if not os.path.isdir("/proc/self/fd"):
        yield
        return
    before = len(descriptors())
    yield
    if len(descriptors()) > before:
        for when in ("setup", "call"):  # what was logged may hold a traceback, and that a slab
            caplog.get_records(when).clear()
        gc.collect()
        left = descriptors()
        assert len(left) <= before, f"the test left descriptors open: {left}"
