"""Measures which path is the fastest for runs of which length, once on each machine."""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lmcache.core.environment import environment_text
from lmcache.core.kernels.accelerator import AcceleratorPages
from lmcache.core.kernels.paths import PATHS, Paths, Table
from lmcache.core.kernels.plan import Planner, Span
from lmcache.core.layout import PageLayout, Region

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lmcache.core.kernels.plan import Int64s
    from lmcache.core.kernels.staging import Device

RUN_BYTES = (2 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 256 << 10)
TOTAL_BYTES = 16 << 20
ROUNDS = 3


class _Pinned:
    """Memory of which all is pinned from the beginning."""

    @contextmanager
    def held(self) -> Iterator[Int64s]:
        """One piece."""
        yield np.array([TOTAL_BYTES], np.int64)


def calibrate(make_device: Callable[[Planner], Device]) -> Table:
    """Copy `TOTAL_BYTES` both ways by each path, in runs of each length.

    Takes seconds where the kernels have to be compiled first.
    """
    table: Table = {"store": {}, "load": {}}
    for run_bytes in RUN_BYTES:
        for name, found in _fastest(run_bytes, make_device).items():
            table[name][run_bytes] = found
    return table


def _fastest(run_bytes: int, make_device: Callable[[Planner], Device]) -> dict[str, str]:
    """The fastest path for stores, and for loads."""
    nowhere = make_device(Planner(_layout(run_bytes, 0)))
    memory, slab = nowhere.buffer(2 * TOTAL_BYTES), nowhere.pinned(TOTAL_BYTES)
    layout = _layout(run_bytes, memory.address)
    planner = Planner(layout)
    spans = [Span(0, layout.num_pages, 0, range(layout.num_pages))]
    seconds: dict[str, dict[str, float]] = {"store": {}, "load": {}}
    for path in PATHS:
        forced = Paths({}, path)
        pages = AcceleratorPages(
            layout, planner, make_device(planner), slab, pins=_Pinned(), paths=forced
        )
        for name, row in seconds.items():
            row[path] = _best(pages, spans, to_slab=name == "store")
        pages.close()
    return {name: min(PATHS, key=row.__getitem__) for name, row in seconds.items()}


def _layout(run_bytes: int, base: int) -> PageLayout:
    """Pages with gaps between them, so that none are joined."""
    pages = TOTAL_BYTES // run_bytes
    region = Region("calibration", base, pages, 2 * run_bytes, (), run_bytes, "")
    return PageLayout((region,), 1, "calibration")


def _best(pages: AcceleratorPages, spans: list[Span], *, to_slab: bool) -> float:
    """Seconds of the fastest of a few, after one that compiles what is needed."""
    times = []
    for _ in range(1 + ROUNDS):
        begun = time.perf_counter()
        pages.copy(spans, None, to_slab=to_slab)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


class Notebook:
    """Tables that were measured on this machine, by device and software."""

    def __init__(self, folder: Path | None = None) -> None:
        """By default in the user's own folder for what can be made again."""
        caches = environment_text("XDG_CACHE_HOME") or Path.home() / ".cache"
        self._file = (folder or Path(caches) / "lmcache") / "copy-paths.json"

    def find(self, machine: str) -> Table | None:
        """The table of a machine; None if there is none that can be read."""
        table = self._all().get(machine)
        if not isinstance(table, dict) or sorted(table) != ["load", "store"]:
            return None
        try:
            read = {name: {int(n): p for n, p in row.items()} for name, row in table.items()}
            is_whole = all(row and set(row.values()) <= set(PATHS) for row in read.values())
        except (AttributeError, TypeError, ValueError):
            return None
        return read if is_whole else None

    def keep(self, machine: str, table: Table) -> None:
        """For the next time. A folder that cannot be written to means to measure again."""
        with suppress(OSError):
            tables = {**self._all(), machine: table}
            self._file.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._file.with_name(f"{self._file.name}.{os.getpid()}")
            fresh.write_text(json.dumps(tables, indent=1))
            fresh.replace(self._file)

    def _all(self) -> dict[str, object]:
        try:
            tables = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}
        return tables if isinstance(tables, dict) else {}
