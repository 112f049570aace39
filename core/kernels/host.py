"""Copies between host addresses at memory speed, with the interpreter lock released."""

from __future__ import annotations

import ctypes
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lmcache.core.kernels.nearby import stay_on_node

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lmcache.core.kernels.plan import Int64s, Planner, Span
    from lmcache.core.slab import Slab

_libc = ctypes.CDLL(None)
_memmove = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(_libc.memmove, ctypes.c_void_p).value or 0
)

PARALLEL_BYTES = 4 << 20
"""Below this a second thread costs more than it copies; measured on a 2-core virtual machine."""
PIECE_BYTES = 512 << 10
"""Longer runs are cut, so that threads share them; the fastest size on the same machine."""


def _copy_each(
    runs: Iterator[int], destination: list[int], source: list[int], length: list[int]
) -> None:
    for run in runs:
        _memmove(destination[run], source[run], length[run])


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

    def mark(self) -> None:
        """What has been written is there."""

    def copy(
        self, spans: Sequence[Span], region: int | None, *, to_slab: bool, after: object = None
    ) -> int:
        """Copy `spans`, whose payloads are slab offsets; done when this returns."""
        runs = self._planner.plan(spans, region)
        stored = runs.stored + np.int64(self._address)
        if to_slab:
            self._copier.copy(stored, runs.engine, runs.length)
        else:
            self._copier.copy(runs.engine, stored, runs.length)
        return runs.total_bytes

    def stay_near(self) -> None:
        """On the nodes of the engine's main thread."""
        stay_on_node()

    def close(self) -> None:
        """End the threads."""
        self._copier.close()


class HostCopier:
    """Copies runs on up to `threads` threads of its own, the caller's included."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        can_choose = hasattr(os, "sched_getaffinity")
        self._cores = os.sched_getaffinity(os.getpid()) if can_choose else set()
        self._helpers: list[int] = []
        self._pool = ThreadPoolExecutor(
            max(threads - 1, 1), "lmcache-copy", initializer=self._spread
        )

    def copy(self, destination: Int64s, source: Int64s, length: Int64s) -> None:
        """Copy run i from `source[i]` to `destination[i]`; done when this returns."""
        destination, source, length = _cut(destination, source, length)
        runs = iter(range(len(length)))  # each is taken by whoever is free
        work = partial(_copy_each, runs, destination.tolist(), source.tolist(), length.tolist())
        others = []
        if length.sum() >= PARALLEL_BYTES and len(length) >= self._threads:
            self._keep_off_this_core()
            others = [self._pool.submit(work) for _ in range(self._threads - 1)]
        work()
        for other in others:
            other.result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _spread(self) -> None:
        # engines pin their main thread to one core, and a new thread inherits that
        self._helpers.append(threading.get_native_id())
        if self._cores:
            os.sched_setaffinity(0, self._cores)

    def _keep_off_this_core(self) -> None:
        # of two busy cores the kernel often chose ours, and moved the thread milliseconds later
        if len(self._cores) > 1:
            others = self._cores - {_libc.sched_getcpu()}
            for thread in self._helpers:
                os.sched_setaffinity(thread, others)
