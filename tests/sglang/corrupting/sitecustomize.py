"""Like that of `stubs`, but whatever is loaded has a token whose keys and values are lost."""

from __future__ import annotations

import ctypes
import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[1] / "stubs" / "sitecustomize.py"))

from lmcache.adapters.sglang.worker import Loading  # noqa: E402  (after what it needs)

load = Loading._load


def lose(self, regions):
    is_good = load(self, regions)
    for region in self._granted.mover.layout.regions:
        for move in self._copies.moves:
            ctypes.memset(region.base + move.pages[0] * region.page_stride, 0, region.page_bytes)
    return is_good


Loading._load = lose
