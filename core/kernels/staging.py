"""Copies through buffers on the device: a kernel on one side, the copy engine on the other.

Whatever the pages are like, the copy engine moves long extents, and kernels never wait for a bus.
Two streams work side by side; every step in which one must not overtake the other is a `wait`.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lmcache.core.kernels.pinning import are_held
from lmcache.core.kernels.tiles import absolute, columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from lmcache.core.kernels.host import HostCopier
    from lmcache.core.kernels.plan import Int64s, Pages
    from lmcache.core.kernels.tiles import Tile

BUFFERS = 3
"""One that is filled, one that is emptied, and one so that neither waits for the other."""
BUFFER_BYTES = 16 << 20


class Event(Protocol):
    """A point in the work of a stream."""

    def synchronize(self) -> None:
        """Return when all work before it is done."""


class Stream(Protocol):
    """Work on a device that is done in order."""

    def copy(self, target: Int64s, source: Int64s, length: Int64s, *, stays: bool) -> None:
        """Have the copy engine copy runs; `stays` if nothing queued before changes the source."""

    def launch(self, regions: range, pages: Pages, *, to_stored: bool) -> None:
        """Have a kernel copy pages of some regions; payloads are device addresses."""

    def record(self) -> Event:
        """The point reached when all that was queued so far is done."""

    def wait(self, event: Event) -> None:
        """Do nothing that is queued from now on before `event`."""

    def synchronize(self) -> None:
        """Return when all that was queued is done."""


class Memory(Protocol):
    """A piece of memory that lives as long as this."""

    address: int


class Device(Protocol):
    """Where pages and buffers lie."""

    kernels_only: bool
    """Whether nothing but a kernel may write to the pages: they are another process's."""

    def stream(self) -> Stream:
        """A new stream, beside all others."""

    def buffer(self, size: int) -> Memory:
        """Memory of the device."""

    def pinned(self, size: int) -> Memory:
        """Memory of the host that the device copies at full speed."""


@dataclass
class _Buffer:
    device: Memory
    host: Memory | None = None
    """Its twin, for parts of the slab that are not pinned."""
    used: Event | None = None
    """The last that any stream has to do with it."""
    landing: Callable[[], None] | None = None
    """What remains to be done once `used` is over."""


class Staging:
    """A ring of buffers between pages and the slab, for one thread at a time."""

    def __init__(
        self,
        device: Device,
        slab_address: int,
        host: HostCopier,
        *,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """`host` copies what of the slab is not pinned."""
        self._device = device
        self._slab = np.int64(slab_address)
        self._host = host
        self._size = buffer_bytes
        self._kernels, self._engine = device.stream(), device.stream()
        self._ring = [_Buffer(device.buffer(buffer_bytes)) for _ in range(BUFFERS)]

    def store(self, tiles: Iterable[Tile], held: Int64s, after: Event | None) -> None:
        """Copy pages to the slab, once `after` is over; done when this returns.

        `held` are the ends of what is pinned, as `Pins` says.
        """
        with self._all_or_nothing():
            if after:
                self._kernels.wait(after)
            for tile, buffer in zip(tiles, cycle(self._ring), strict=False):
                self._land(buffer)
                if buffer.used:
                    self._kernels.wait(buffer.used)
                address = buffer.device.address
                self._kernels.launch(tile.regions, absolute(tile.pages, address), to_stored=True)
                self._engine.wait(self._kernels.record())
                self._empty(tile, buffer, held)
                buffer.used = self._engine.record()
            self._engine.synchronize()
            for buffer in self._ring:
                self._land(buffer)

    def load(self, tiles: Iterable[Tile], held: Int64s, after: Event | None) -> None:
        """Copy the slab to pages, likewise."""
        with self._all_or_nothing():
            if after:
                self._kernels.wait(after)
            for tile, buffer in zip(tiles, cycle(self._ring), strict=False):
                if buffer.used:
                    self._engine.wait(buffer.used)
                self._fill(tile, buffer, held)
                self._kernels.wait(self._engine.record())
                address = buffer.device.address
                self._kernels.launch(tile.regions, absolute(tile.pages, address), to_stored=False)
                buffer.used = self._kernels.record()
            self._kernels.synchronize()

    # ----

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """After an error nothing is under way, and nothing of it is done by a later call."""
        try:
            yield
        except BaseException:
            for buffer in self._ring:
                buffer.landing = None
            for stream in (self._kernels, self._engine):
                with suppress(Exception):  # each library has its own
                    stream.synchronize()
            raise

    def _empty(self, tile: Tile, buffer: _Buffer, held: Int64s) -> None:
        inside, stored, length = columns(tile.extents)
        if are_held(held, stored, length):
            source = inside + np.int64(buffer.device.address)
            self._engine.copy(stored + self._slab, source, length, stays=False)
            return
        twin = self._twin(buffer)
        self._engine.copy(*_one(twin, buffer.device.address, tile.size), stays=False)
        buffer.landing = lambda: self._host.copy(
            stored + self._slab, inside + np.int64(twin), length
        )

    def _fill(self, tile: Tile, buffer: _Buffer, held: Int64s) -> None:
        inside, stored, length = columns(tile.extents)
        target = inside + np.int64(buffer.device.address)
        if are_held(held, stored, length):
            self._engine.copy(target, stored + self._slab, length, stays=True)
            return
        twin = self._twin(buffer)
        if buffer.used:
            buffer.used.synchronize()  # the copy engine may still be reading the twin
        self._host.copy(inside + np.int64(twin), stored + self._slab, length)
        self._engine.copy(target, inside + np.int64(twin), length, stays=True)

    def _land(self, buffer: _Buffer) -> None:
        if buffer.landing:
            assert buffer.used
            buffer.used.synchronize()
            buffer.landing()
            buffer.landing = None

    def _twin(self, buffer: _Buffer) -> int:
        if buffer.host is None:
            buffer.host = self._device.pinned(self._size)
        return buffer.host.address


def _one(target: int, source: int, length: int) -> tuple[Int64s, Int64s, Int64s]:
    return np.array([target], np.int64), np.array([source], np.int64), np.array([length], np.int64)
