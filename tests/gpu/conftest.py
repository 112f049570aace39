"""Tests on a CUDA device: `pytest tests/gpu`. Without one they are skipped, and say so."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent.parent

# streams that share a queue of the device wait for each other; to be said before CUDA begins
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def load(name, folder):
    """Import a helper of other tests, which belong to no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TESTS / folder / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


load("pools", "kernels")
collect_ignore = []
if all(map(importlib.util.find_spec, ("msgspec", "prometheus_client", "xxhash"))):
    load("rig", "core")
else:  # a machine that is lent for an hour may have only what the kernels need
    collect_ignore.append("test_gpu_lending.py")


def pytest_report_header():
    return [f"left out, for want of what it imports: {name}" for name in collect_ignore]


def pytest_collection_modifyitems(items):
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class DevicePool:
    """A pool of `pools`, on the GPU."""

    def __init__(self, pool):
        pool.fill()
        self.pool = pool
        self.memory = pool.memory.cuda()
        moved = self.memory.data_ptr() - pool.memory.data_ptr()
        regions = [replace(region, base=region.base + moved) for region in pool.layout.regions]
        self.layout = replace(pool.layout, regions=tuple(regions))

    def object(self, pages):
        """By indexing, on the host."""
        self.pool.memory.copy_(self.memory.cpu())
        return self.pool.object(pages)

    def fill(self):
        self.pool.fill()
        self.memory.copy_(self.pool.memory)


@pytest.fixture
def on_gpu():
    return DevicePool
