"""How fast a storage backend is: objects put and got back by several threads, and compared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from lmcache.cli.output import Format, FormatOption, print_json, table
from lmcache.cli.timing import Plain, spread
from lmcache.core.errors import BackendError, ConfigError
from lmcache.core.keys import ChunkKey
from lmcache.core.redact import redact_value
from lmcache.core.urls import parse_size, parse_url, take_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.core.backend import StorageBackend
    from lmcache.plugins.manager import PluginManager

FIGURES = ("put_gb_s", "put_p50_ms", "put_p99_ms", "get_gb_s", "get_p50_ms", "get_p99_ms")


def backend(
    ctx: typer.Context,
    url: Annotated[str, typer.Argument(help="Where to read and write; it may be in use.")],
    size: Annotated[list[str] | None, typer.Option(help="Bytes of an object; repeatable.")] = None,
    depth: Annotated[list[int] | None, typer.Option(min=1, help="Threads; repeatable.")] = None,
    total: Annotated[str, typer.Option(help="Bytes of all objects of a row.")] = "256MiB",
    output_format: FormatOption = Format.TERMINAL,
) -> None:
    """Put objects of its own at URL, get them back, and compare every byte.

    Beside files stands what fio reaches there with requests of that size, if it is installed. Exits
    with 1 if anything came back wrong.
    """
    plugins: PluginManager = ctx.obj
    sizes = [parse_size(text) for text in size or ("256KiB", "4MiB")]
    everything = parse_size(total)
    if min(sizes) < 1 or max(sizes) > everything:
        raise ConfigError(f"objects of 1 to {everything} bytes can be measured, --total says more")
    rows = []
    with plugins.open_backend(url) as store:
        for bytes_each, threads in product(sizes, depth or (1, 4)):
            row = measure(store, bytes_each, threads, everything // bytes_each)
            rows.append({**row, **_fio(url, bytes_each, threads, everything)})
    if output_format is Format.JSON:
        print_json({"url": redact_value(url), "rows": rows})
    else:
        print(_shown(rows))
    raise typer.Exit(1 if any(row["wrong"] for row in rows) else 0)


def measure(store: StorageBackend, size: int, depth: int, count: int) -> dict[str, Any]:
    """Figures of `count` objects, which are removed again where the backend removes."""
    keys = [ChunkKey(os.urandom(32)) for _ in range(count)]
    given = np.random.default_rng().integers(0, 256, (count, size), np.uint8)
    taken = ~given  # other bytes, in memory that is in use
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


def _remove(store: StorageBackend, keys: list[ChunkKey]) -> None:
    if store.capabilities.removal:
        for key in keys:
            store.remove(key)


class Calls:
    """Calls `call` with each number, on `depth` threads."""

    def __init__(self, depth: int, count: int, call: Callable[[int], bool]) -> None:
        self.times = [0.0] * count

        def one(number: int) -> bool:
            begun = time.perf_counter()
            answer = call(number)
            self.times[number] = time.perf_counter() - begun
            return answer

        with ThreadPoolExecutor(depth) as threads:
            begun = time.perf_counter()
            self.answers = list(threads.map(one, range(count)))
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


def _fio(url: str, size: int, depth: int, total: int) -> dict[str, float]:
    """What fio reaches in the same directory, through the page cache as well."""
    if not url.startswith("file:") or shutil.which("fio") is None:
        return {}
    bare, _ = take_options(
        url, [part.partition("=")[0] for part in url.partition("?")[2].split("&")]
    )
    figures = {}
    with tempfile.TemporaryDirectory(dir=parse_url(bare).path) as folder:
        for job, name in (("write", "put"), ("read", "get")):
            command = ["fio", "--name=lmcache", f"--directory={folder}", f"--rw={job}"]
            command += [f"--bs={size}", f"--numjobs={depth}", "--ioengine=psync", "--thread"]
            command += [f"--size={total // size // depth * size or size}", "--invalidate=0"]
            command += ["--group_reporting", "--output-format=json"]
            done = subprocess.run(command, capture_output=True, check=False, text=True)  # noqa: S603
            if done.returncode:
                raise ConfigError(f"fio cannot run in {folder}: {done.stderr.strip()[:200]}")
            figures[f"fio_{name}_gb_s"] = json.loads(done.stdout)["jobs"][0][job]["bw_bytes"] / 1e9
    return figures


def _shown(rows: list[dict[str, Any]]) -> str:
    header = ["size", "depth", "objects", "refused", "missed", "wrong", *FIGURES, "memcpy_gb_s"]
    header += [name for name in ("fio_put_gb_s", "fio_get_gb_s") if name in rows[0]]
    cells = [[row[name] for name in header] for row in rows]
    shown = [[f"{c:.3f}" if isinstance(c, float) else c for c in line] for line in cells]
    return table(header, shown)
