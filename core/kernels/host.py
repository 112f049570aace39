"""Copies between host addresses at memory speed, with the interpreter lock released."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.core.kernels.plan import Int64s, Planner, Span
    from lmcache.core.slab import Slab

_libc = ctypes.CDLL(None)
_memmove = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(_libc.memmove, ctypes.c_void_p).value or 0
)

PARALLEL_BYTES = 4 << 20
"""Below this a second thread costs more than it copies; measured on a 2-core virtual machine."""
PIECE_BYTES = 2 << 20
"""Longer runs are cut, so that threads get equal shares."""


def _copy_each(destination: list[int], source: list[int], length: list[int]) -> None:
    for to, origin, size in zip(destination, source, length, strict=True):
        _memmove(to, origin, size)


def _cut(destination: Int64s, source: Int64s, length: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """The same bytes in runs of at most `PIECE_BYTES`."""
    pieces = -(-length // PIECE_BYTES)
    if pieces.max(initial=0) <= 1:
        return destination, source, length
    run = np.repeat(np.arange(len(length)), pieces)
    first = np.cumsum(pieces) - pieces
    start = (np.arange(len(run)) - first[run]) * PIECE_BYTES
    return (
        destination[run] + start,
        source[run] + start,
        np.minimum(length[run] - start, PIECE_BYTES),
    )


class HostPages:
    """Copies pages that lie in this machine's memory, addressed by their layout."""

    def __init__(self, planner: Planner, slab: Slab, threads: int) -> None:
        self._planner = planner
        self._address = slab.address
        self._copier = HostCopier(threads)

    def copy(self, spans: Sequence[Span], region: int | None, *, to_slab: bool) -> int:
        """Copy `spans`, whose payloads are slab offsets; done when this returns."""
        runs = self._planner.plan(spans, region)
        stored = runs.stored + np.int64(self._address)
        if to_slab:
            self._copier.copy(stored, runs.engine, runs.length)
        else:
            self._copier.copy(runs.engine, stored, runs.length)
        return runs.total_bytes

    def close(self) -> None:
        """End the threads."""
        self._copier.close()


class HostCopier:
    """Copies runs on up to `threads` threads of its own, the caller's included."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._cores = os.sched_getaffinity(os.getpid()) if hasattr(os, "sched_getaffinity") else ()
        self._pool = ThreadPoolExecutor(
            max(threads - 1, 1), "lmcache-copy", initializer=self._spread
        )

    def copy(self, destination: Int64s, source: Int64s, length: Int64s) -> None:
        """Copy run i from `source[i]` to `destination[i]`; done when this returns."""
        destination, source, length = _cut(destination, source, length)
        total = int(length.sum())
        if self._threads == 1 or total < PARALLEL_BYTES or len(length) < self._threads:
            _copy_each(destination.tolist(), source.tolist(), length.tolist())
            return
        shares = np.arange(1, self._threads) * (total // self._threads)
        cuts = [0, *np.searchsorted(np.cumsum(length), shares, "right").tolist(), len(length)]
        parts = [
            (destination[a:b].tolist(), source[a:b].tolist(), length[a:b].tolist())
            for a, b in pairwise(cuts)
        ]
        others = [self._pool.submit(_copy_each, *part) for part in parts[1:]]
        _copy_each(*parts[0])
        for other in others:
            other.result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _spread(self) -> None:
        # engines pin their main thread to one core, and a new thread inherits that
        if self._cores:
            os.sched_setaffinity(0, self._cores)
