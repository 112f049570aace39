"""Registers the slab with the GPU's driver, in the background, while it is already in use.

A GPU copies memory that is not registered at a third of the speed, and a kernel cannot reach it at
all. Registering takes about a third of a second for each GiB and commits the memory.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lmcache.core.errors import DeviceError
from lmcache.core.gate import Gate
from lmcache.core.log import init_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lmcache.core.kernels.plan import Int64s
    from lmcache.core.slab import Slab

logger = init_logger(__name__)

FIRST_BYTES = 1 << 30
MOST_BYTES = 64 << 30
"""In one registration: some drivers refuse more."""


_of_slabs: dict[int, Pins] = {}
"""By address."""
_lock = threading.Lock()


class Registrar(Protocol):
    """The driver of the GPU, on a thread that it knows."""

    def register(self, address: int, size: int) -> None:
        """Pin a range of host memory. Raises `DeviceError`."""

    def unregister(self, address: int) -> None:
        """Undo it."""


class Pins:
    """What of a slab is registered, growing from its beginning."""

    def __init__(self, slab: Slab, registrar: Registrar) -> None:
        self._slab = slab
        self._registrar = registrar
        self._gate = Gate()
        self._closing = threading.Event()
        self._ends: list[int] = []
        """Of the pieces that are registered."""
        self._thread = threading.Thread(target=self._run, name="lmcache-pins", daemon=True)
        self._thread.start()

    @contextmanager
    def held(self) -> Iterator[Int64s]:
        """The ends of the pieces, which stay registered until this is left."""
        with self._gate.passage() as admitted:
            yield np.array(self._ends if admitted else [], np.int64)

    def close(self) -> None:
        """Let go of the memory; returns when no copy uses it any more."""
        self._closing.set()
        self._thread.join()
        self._gate.shut()
        self._undo()

    def _run(self) -> None:
        size = FIRST_BYTES
        while not self._closing.is_set() and (start := self._end()) < self._slab.size:
            stop = min(start + size, self._slab.size)
            try:
                self._registrar.register(self._slab.address + start, stop - start)
            except DeviceError as error:
                self._give_up(error)
                return
            self._ends.append(stop)
            size = min(2 * size, MOST_BYTES)

    def _end(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _give_up(self, error: DeviceError) -> None:
        """Half a slab would be fast and half slow, and nobody could say why."""
        self._gate.shut()
        self._undo()
        logger.warning(
            "%d GiB of cache cannot be pinned: %s. Copies between GPU and cache go through a small "
            "pinned buffer and are slower. Give the process more locked memory (ulimit -l "
            "unlimited, or RLIMIT_MEMLOCK in its container), or the cache less memory",
            self._slab.size >> 30,
            error,
        )

    def _undo(self) -> None:
        starts = [0, *self._ends]
        self._ends = []
        for start in reversed(starts[:-1]):
            self._registrar.unregister(self._slab.address + start)


def pins_of(slab: Slab, registrar: Registrar) -> Pins:
    """Those of a slab, for all who copy: memory can be registered once in a process.

    They last until the slab is closed, which waits for the copies under way.
    """
    with _lock:
        if slab.address not in _of_slabs:
            _of_slabs[slab.address] = Pins(slab, registrar)
            slab.on_close.append(partial(_close, slab.address))
        return _of_slabs[slab.address]


def _close(address: int) -> None:
    with _lock:
        pins = _of_slabs.pop(address)
    pins.close()


def are_held(ends: Int64s, start: Int64s, length: Int64s) -> bool:
    """Whether each stretch lies in one registered piece: no copy may cross into another."""
    if not len(ends):
        return False
    return bool(
        (start + length <= ends[-1]).all()
        and (np.searchsorted(ends, start, "right") == np.searchsorted(ends, start + length)).all()
    )
