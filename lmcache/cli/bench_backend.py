"""How fast a storage backend is: objects put and got back by several threads, and compared."""

from __future__ import annotations

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from lmcache.cli.bench_fio import Fio, fio_beside
from lmcache.cli.output import Format, FormatOption, print_json, table
from lmcache.cli.timing import Plain, spread
from lmcache.core.assembly import open_tier
from lmcache.core.errors import BackendError, ConfigError
from lmcache.core.keys import ChunkKey
from lmcache.core.redact import redact_value
from lmcache.core.urls import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.core.backend import StorageBackend
    from lmcache.plugins.manager import PluginManager

FIGURES = ("put_gb_s", "put_p50_ms", "put_p99_ms", "get_gb_s", "get_p50_ms", "get_p99_ms")

REST_S = 1.0

BESIDE = {
    "put_of_fio": ("put_gb_s", "fio_put_gb_s"),
    "put_of_fio_again": ("put_gb_s", "fio_again_put_gb_s"),
    "get_of_fio": ("get_gb_s", "fio_get_gb_s"),
}
"""Each is what the backend reaches of what fio does."""


def backend(
    ctx: typer.Context,
    url: Annotated[str, typer.Argument(help="Where to read and write; it may be in use.")],
    size: Annotated[list[str] | None, typer.Option(help="Bytes of an object; repeatable.")] = None,
    depth: Annotated[list[int] | None, typer.Option(min=1, help="Threads; repeatable.")] = None,
    total: Annotated[str, typer.Option(help="Bytes of all objects of a row.")] = "256MiB",
    rounds: Annotated[int, typer.Option(min=1, help="Times each; medians are shown.")] = 3,
    output_format: FormatOption = Format.TERMINAL,
) -> None:
    """Put objects of its own at URL, get them back, and compare every byte.

    Beside files stands what fio reaches there with requests of that size, if it is installed; they
    take turns. Exits with 1 if anything came back wrong.
    """
    plugins: PluginManager = ctx.obj
    sizes = [parse_size(text) for text in size or ("256KiB", "4MiB")]
    everything = parse_size(total)
    if min(sizes) < 1 or max(sizes) > everything:
        raise ConfigError(f"objects of 1 to {everything} bytes can be measured, --total says more")
    with open_tier(url, plugins).backend as store:
        fio = fio_beside(store)
        rows = [
            in_turns(store, fio, (bytes_each, threads, everything // bytes_each), rounds)
            for bytes_each, threads in product(sizes, depth or (1, 4))
        ]
    if output_format is Format.JSON:
        print_json({"url": redact_value(url), "rows": rows})
    else:
        print(_shown(rows))
    raise typer.Exit(1 if any(row["wrong"] for row in rows) else 0)


def in_turns(
    store: StorageBackend, fio: Fio | None, case: tuple[int, int, int], rounds: int
) -> dict[str, Any]:
    """Medians of a case (size, depth, count), which the store and fio measure by turns."""
    seen = []
    for _ in range(rounds):
        _rest()
        figures = measure(store, *case)
        if fio:
            figures |= fio.measure(*case)
            for name, (ours, theirs) in BESIDE.items():
                # of one turn: what the machine does besides changes from one to the next
                figures[name] = figures[ours] / figures[theirs]
        seen.append(figures)
    middle = {name: [figures[name] for figures in seen] for name in seen[0]}
    return {
        name: median(values) if isinstance(values[0], float) else max(values)
        for name, values in middle.items()
    }


def _rest() -> None:
    """Let the disk do what was left to do: nobody pays for what another has deleted."""
    os.sync()
    time.sleep(REST_S)


def measure(store: StorageBackend, size: int, depth: int, count: int) -> dict[str, Any]:
    """Figures of `count` objects, which are removed again where the backend removes."""
    keys = [ChunkKey(os.urandom(32)) for _ in range(count)]
    given, taken = _rows(count, size), _rows(count, size)
    given[:] = np.random.default_rng().integers(0, 256, (count, size), np.uint8)
    taken[:] = ~given  # other bytes, in memory that is in use
    given_views, taken_views = ([memoryview(row) for row in rows] for rows in (given, taken))
    try:
        puts = Calls(depth, count, lambda n: store.put(keys[n], given_views[n]))
        gets = Calls(depth, count, lambda n: store.get_into(keys[n], taken_views[n]) == size)
    except BaseException:
        with suppress(BackendError):  # what failed before is what to be told of
            _remove(store, keys)
        raise
    _remove(store, keys)
    came = np.array(gets.answers)
    copied = Plain(given.nbytes).copy()
    return {
        "size": size,
        "depth": depth,
        "objects": count,
        "refused": count - sum(puts.answers),
        "missed": count - int(came.sum()),
        "wrong": int((given[came] != taken[came]).any(axis=1).sum()),
        **puts.figures("put", size),
        **gets.figures("get", size),
        "memcpy_gb_s": given.nbytes / copied / 1e9,
    }


def _rows(count: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Memory such as the cache gives to a backend: shared, and every row begins a page."""
    stride = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    return np.frombuffer(mmap.mmap(-1, count * stride), np.uint8).reshape(count, stride)[:, :size]


def _remove(store: StorageBackend, keys: list[ChunkKey]) -> None:
    if store.capabilities.removal:
        for key in keys:
            store.remove(key)


class Calls:
    """Calls `call` with each number below `count`, on `depth` threads that take turns."""

    def __init__(self, depth: int, count: int, call: Callable[[int], bool]) -> None:
        self.times = [0.0] * count
        self.answers = [False] * count

        def share(first: int) -> None:
            for number in range(first, count, depth):
                begun = time.perf_counter()
                self.answers[number] = call(number)
                self.times[number] = time.perf_counter() - begun

        with ThreadPoolExecutor(depth) as threads:
            begun = time.perf_counter()
            list(threads.map(share, range(depth)))
            self.seconds = time.perf_counter() - begun

    def figures(self, name: str, size: int) -> dict[str, float]:
        """Of the calls that did what was asked."""
        done = [t * 1e3 for t, well in zip(self.times, self.answers, strict=True) if well]
        times = spread(done)
        return {
            f"{name}_gb_s": len(done) * size / self.seconds / 1e9,
            f"{name}_p50_ms": times.get("p50", 0.0),
            f"{name}_p99_ms": times.get("p99", 0.0),
        }


def _shown(rows: list[dict[str, Any]]) -> str:
    header = ["size", "depth", "objects", "refused", "missed", "wrong", *FIGURES, "memcpy_gb_s"]
    if "put_of_fio" in rows[0]:
        header += [column for name, (_, theirs) in BESIDE.items() for column in (theirs, name)]
    cells = [[row[name] for name in header] for row in rows]
    shown = [[f"{c:.3f}" if isinstance(c, float) else c for c in line] for line in cells]
    return table(header, shown)
