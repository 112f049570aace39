"""A CUDA device as `staging` wants it: torch's streams and events, the driver's copies."""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from lmcache.core.errors import DeviceError
from lmcache.core.kernels.accelerator import AcceleratorPages, BothWays
from lmcache.core.kernels.calibrate import Notebook, calibrate
from lmcache.core.kernels.copier import mark_on
from lmcache.core.kernels.driver import Driver
from lmcache.core.kernels.nearby import stay_near
from lmcache.core.kernels.paged import PagedKernel
from lmcache.core.kernels.paths import Paths, forced_path
from lmcache.core.kernels.pinning import pins_of
from lmcache.core.log import init_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.core.kernels.plan import Int64s, Pages, Planner, Shape, Span
    from lmcache.core.kernels.staging import Event
    from lmcache.core.layout import PageLayout
    from lmcache.core.slab import Slab

logger = init_logger(__name__)

_IDLE: defaultdict[int, list[int]] = defaultdict(list)
"""Streams that nobody uses any more, by device: torch keeps memory for each it has ever seen."""


class CudaMemory:
    """A piece of memory, given back to torch with the last reference."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.address = tensor.data_ptr()


class CudaStream:
    """A stream of its own, for any thread."""

    def __init__(self, driver: Driver, device: torch.device, kernels: Kernels) -> None:
        self._driver = driver
        self._kernels = kernels
        idle = _IDLE[device.index]
        try:
            made = idle.pop()
        except IndexError:
            made = driver.new_stream()
        self._stream = torch.cuda.ExternalStream(made, device)  # type: ignore[no-untyped-call]
        weakref.finalize(self, idle.append, made).atexit = False

    def copy(self, target: Int64s, source: Int64s, length: Int64s, *, stays: bool) -> None:
        """One call of the driver for all runs."""
        with torch.cuda.stream(self._stream):
            self._driver.copy(target, source, length, self._stream.cuda_stream, stays=stays)

    def launch(self, regions: range, pages: Pages, *, to_stored: bool) -> None:
        """One kernel for each shape of regions."""
        with torch.cuda.stream(self._stream):
            self._kernels.launch(regions, pages, to_stored=to_stored)

    def record(self) -> torch.cuda.Event:
        """An event nobody measures time with."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def wait(self, event: Any) -> None:
        """Queued work waits on the device, not the host."""
        self._stream.wait_event(event)

    def synchronize(self) -> None:
        """The interpreter lock is released meanwhile."""
        self._stream.synchronize()


class Kernels:
    """The kernels of one layout, which write to its pages only if the guard, if any, lets them."""

    def __init__(self, planner: Planner, device: torch.device, guard: int) -> None:
        self._guard = guard
        self._shapes = [(shape, PagedKernel(shape, device)) for shape in planner.shapes]
        for _, kernel in self._shapes:
            kernel.warm(guard=guard)
        torch.cuda.current_stream(device).synchronize()  # other streams read these tables

    def launch(self, regions: range, pages: Pages, *, to_stored: bool) -> None:
        """Copy pages of a range of the layout's regions; payloads are device addresses."""
        for shape, kernel in self._shapes:
            rows = _rows(shape, regions)
            if rows:
                guard = 0 if to_stored else self._guard
                kernel.launch(pages, to_stored=to_stored, regions=rows, guard=guard)


def _rows(shape: Shape, regions: range) -> range:
    """Which of the shape's regions are among `regions`."""
    return range(
        bisect_left(shape.members, regions.start), bisect_left(shape.members, regions.stop)
    )


class CudaDevice:
    """Makes streams and memory on one GPU."""

    def __init__(
        self, planner: Planner, device: torch.device, driver: Driver, guard: int = 0
    ) -> None:
        self._device = device
        self._driver = driver
        self.kernels_only = bool(guard)
        self._kernels = Kernels(planner, device, guard)

    def stream(self) -> CudaStream:
        """Beside all streams of the engine."""
        return CudaStream(self._driver, self._device, self._kernels)

    def buffer(self, size: int) -> CudaMemory:
        """Memory that counts as torch's."""
        made = CudaMemory(torch.empty(size, dtype=torch.uint8, device=self._device))
        # whoever had the memory before may still use it, in the order of this thread's stream
        torch.cuda.current_stream(self._device).synchronize()
        return made

    def pinned(self, size: int) -> CudaMemory:
        """Host memory that is registered with the driver."""
        return CudaMemory(torch.empty(size, dtype=torch.uint8, pin_memory=True))


class _Registrar:
    """Pins memory on any thread, which stays next to the device: pinning is the first touch."""

    def __init__(self, driver: Driver, device: int) -> None:
        self._driver = driver
        self._device = device
        self._bus_id = driver.bus_id(device)

    def stay_near(self) -> None:
        stay_near(self._bus_id)

    def register(self, address: int, size: int) -> None:
        self._driver.bind(self._device)
        self.stay_near()
        self._driver.register(address, size)
        if self._driver.device_address(address) != address:  # as on WSL 2
            self._driver.unregister(address)
            raise DeviceError("the device sees pinned memory at another address")

    def unregister(self, address: int) -> None:
        self._driver.bind(self._device)
        self._driver.unregister(address)


class CudaPages:
    """Pages on a CUDA device, with the slab being pinned from now on. For any thread."""

    def __init__(
        self,
        layout: PageLayout,
        planner: Planner,
        slab: Slab,
        device: torch.device,
        threads: int,
        *,
        guard: int = 0,
    ) -> None:
        """With `guard`, the address of a guard's word, only what that lets in writes to the pages.

        Raises `DeviceError` without a driver, `ConfigError` for a forced path that is none.
        """
        self._device = device
        self._driver = Driver()
        self._driver.bind(device.index)
        self.paths = paths_of(device, self._driver)
        made = CudaDevice(planner, device, self._driver, guard)
        self._registrar = _Registrar(self._driver, device.index)
        self._pins = pins_of(slab, self._registrar)
        self._ways = BothWays(
            lambda: AcceleratorPages(
                layout,
                planner,
                made,
                slab,
                pins=self._pins,
                paths=self.paths,
                threads=threads,
            )
        )

    def mark(self) -> torch.cuda.Event:
        """What the calling thread has queued so far, on torch's current stream."""
        return mark_on(self._device)

    def copy(
        self,
        spans: Sequence[Span],
        region: int | None,
        *,
        to_slab: bool,
        after: Event | None = None,
    ) -> int:
        """As `AcceleratorPages` does; a store and a load may be under way at a time."""
        self._driver.bind(self._device.index)
        return self._ways.copy(spans, region, to_slab=to_slab, after=after)

    def stay_near(self) -> None:
        """Next to the device."""
        self._registrar.stay_near()

    def close(self) -> None:
        """End the threads. What is pinned stays so until the slab is closed."""
        self._ways.close()


def paths_of(device: torch.device, driver: Driver) -> Paths:
    """The fastest paths of a device that the thread is bound to: measured once, and kept in a file.

    Raises `ConfigError` for a forced path that is none.
    """
    forced = forced_path()
    if forced:
        return Paths({}, forced)
    name = torch.cuda.get_device_name(device)
    machine = f"{name}, CUDA {torch.version.cuda}, driver {driver.version}"
    notebook = Notebook()
    table = notebook.find(machine)
    if table is None:
        table = calibrate(lambda planner: CudaDevice(planner, device, driver))
        notebook.keep(machine, table)
        torch.cuda.empty_cache()  # what measuring took is the engine's again
    logger.info("Paths between %s and the cache, from which bytes of a run on: %s", machine, table)
    return Paths(table)
