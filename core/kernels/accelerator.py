"""Copies between pages on an accelerator and the slab, each by the path that is fastest for it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lmcache.core.kernels.host import HostCopier
from lmcache.core.kernels.paths import DIRECT, KERNEL, STAGED
from lmcache.core.kernels.pinning import are_held
from lmcache.core.kernels.staging import BUFFER_BYTES, Staging
from lmcache.core.kernels.tiles import Tiler, absolute

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from lmcache.core.kernels.paths import Paths
    from lmcache.core.kernels.plan import Int64s, Pages, Planner, Span
    from lmcache.core.kernels.staging import Device, Event, Memory
    from lmcache.core.layout import PageLayout


class Held(Protocol):
    """Says what of the slab is pinned, and keeps it so meanwhile. `Pins` is one."""

    def held(self) -> AbstractContextManager[Int64s]:
        """The ends of the pieces, from the slab's beginning on."""


class AcceleratorPages:
    """The pages of one layout on one device. For one thread at a time."""

    def __init__(
        self,
        layout: PageLayout,
        planner: Planner,
        device: Device,
        slab: Memory,
        *,
        pins: Held,
        paths: Paths,
        threads: int = 2,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """`threads` copy what is not pinned; it takes `BUFFERS` times `buffer_bytes` of the device.

        What it was given is the caller's to close.
        """
        self._layout = layout
        self._planner = planner
        self._pins = pins
        self._paths = paths
        self._kernels_only = device.kernels_only
        self._slab = np.int64(slab.address)
        self._host = HostCopier(threads)
        self._tiler = Tiler(planner, layout, buffer_bytes)
        self._staging = Staging(
            device, slab.address, self._host, buffer_bytes=self._tiler.tile_bytes
        )
        self._stream = device.stream()

    def copy(
        self,
        spans: Sequence[Span],
        region: int | None,
        *,
        to_slab: bool,
        after: Event | None = None,
    ) -> int:
        """Copy `spans`, whose payloads are slab offsets, once `after` is over; done on return."""
        pages = self._planner.pages(spans)
        if not len(pages.ids):
            return 0
        regions = self._layout.regions if region is None else (self._layout.regions[region],)
        size = len(pages.ids) * sum(one.page_bytes for one in regions)
        path = self._paths.choose(size / self._runs(pages, region), to_slab=to_slab)
        if path == DIRECT and self._kernels_only and not to_slab:  # it passes no guard
            path = STAGED
        with self._pins.held() as held:
            if path == DIRECT and self._copy_runs(spans, region, held, after, to_slab=to_slab):
                return size
            if path == KERNEL and _all_held(spans, self._layout.page_bytes, held):
                self._launch(pages, region, after, to_slab=to_slab)
                return size
            tiles = self._tiler.tiles(spans, region)
            move = self._staging.store if to_slab else self._staging.load
            move(tiles, held, after)
        return size

    def close(self) -> None:
        """End the threads."""
        self._host.close()

    # ----

    def _runs(self, pages: Pages, region: int | None) -> int:
        """About how many runs there are; none has to be planned for that."""
        joined = len(pages.joined().ids)
        return sum(
            (joined if shape.is_dense else len(pages.ids))
            * shape.offsets.shape[1]
            * (len(shape.members) if region is None else 1)
            for shape in self._planner.shapes
            if region is None or region in shape.members
        )

    def _copy_runs(
        self,
        spans: Sequence[Span],
        region: int | None,
        held: Int64s,
        after: Event | None,
        *,
        to_slab: bool,
    ) -> bool:
        """Copy each run; False, and nothing is done, if some of the slab is not pinned."""
        runs = self._planner.plan(spans, region)
        if not are_held(held, runs.stored, runs.length):
            return False
        if after:
            self._stream.wait(after)
        stored = runs.stored + self._slab
        target, source = (stored, runs.engine) if to_slab else (runs.engine, stored)
        try:
            self._stream.copy(target, source, runs.length, stays=not to_slab)
        finally:  # after an error as well nothing may be under way
            self._stream.synchronize()
        return True

    def _launch(
        self, pages: Pages, region: int | None, after: Event | None, *, to_slab: bool
    ) -> None:
        if after:
            self._stream.wait(after)
        chosen = range(len(self._layout.regions)) if region is None else range(region, region + 1)
        self._stream.launch(chosen, absolute(pages, int(self._slab)), to_stored=to_slab)
        self._stream.synchronize()


class BothWays:
    """Stores and loads of the same pages, each way by itself. For any thread."""

    def __init__(self, make: Callable[[], AcceleratorPages]) -> None:
        """`make` is called once for each way."""
        self._ways: dict[bool, AcceleratorPages] = {}
        self._turns = {True: threading.Lock(), False: threading.Lock()}
        try:
            for to_slab in self._turns:
                self._ways[to_slab] = make()
        except BaseException:
            self.close()
            raise

    def copy(
        self,
        spans: Sequence[Span],
        region: int | None,
        *,
        to_slab: bool,
        after: Event | None = None,
    ) -> int:
        """As `AcceleratorPages` does; those of one way take turns."""
        with self._turns[to_slab]:
            return self._ways[to_slab].copy(spans, region, to_slab=to_slab, after=after)

    def close(self) -> None:
        """End the threads."""
        for pages in self._ways.values():
            pages.close()


def _all_held(spans: Sequence[Span], page_bytes: int, held: Int64s) -> bool:
    """Whether a kernel reaches all of the objects."""
    start = np.array([span.payload for span in spans], np.int64)
    length = np.array([span.object_pages * page_bytes for span in spans], np.int64)
    return are_held(held, start, length)
