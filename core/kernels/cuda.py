"""A CUDA device as `staging` wants it: torch's streams and events, the driver's copies."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

import torch

from lmcache.core.kernels.accelerator import AcceleratorPages
from lmcache.core.kernels.calibrate import Notebook, calibrate
from lmcache.core.kernels.driver import Driver
from lmcache.core.kernels.paged import PagedKernel
from lmcache.core.kernels.paths import Paths, Table
from lmcache.core.kernels.pinning import Pins

if TYPE_CHECKING:
    from lmcache.core.kernels.plan import Int64s, Pages, Planner, Shape
    from lmcache.core.layout import PageLayout
    from lmcache.core.slab import Slab


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
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

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
    """The kernels of one layout."""

    def __init__(self, planner: Planner, device: torch.device) -> None:
        self._shapes = [(shape, PagedKernel(shape, device)) for shape in planner.shapes]
        torch.cuda.current_stream(device).synchronize()  # other streams read these tables

    def launch(self, regions: range, pages: Pages, *, to_stored: bool) -> None:
        """Copy pages of a range of the layout's regions; payloads are device addresses."""
        for shape, kernel in self._shapes:
            rows = _rows(shape, regions)
            if rows:
                kernel.launch(pages, to_stored=to_stored, regions=rows)


def _rows(shape: Shape, regions: range) -> range:
    """Which of the shape's regions are among `regions`."""
    return range(
        bisect_left(shape.members, regions.start), bisect_left(shape.members, regions.stop)
    )


class CudaDevice:
    """Makes streams and memory on one GPU."""

    def __init__(
        self, planner: Planner, device: torch.device, driver: Driver | None = None
    ) -> None:
        """Raises `DeviceError` without a driver."""
        self._device = device
        self._driver = driver or Driver()
        self._kernels = Kernels(planner, device)

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
    """Pins memory on any thread: each must have been told which device is meant."""

    def __init__(self, driver: Driver, device: torch.device) -> None:
        self._driver = driver
        self._device = device

    def register(self, address: int, size: int) -> None:
        torch.cuda.set_device(self._device)
        self._driver.register(address, size)

    def unregister(self, address: int) -> None:
        torch.cuda.set_device(self._device)
        self._driver.unregister(address)


class CudaPages(AcceleratorPages):
    """Pages on a CUDA device, with the slab being pinned from now on."""

    def __init__(
        self, layout: PageLayout, planner: Planner, slab: Slab, device: torch.device, threads: int
    ) -> None:
        """Measures the paths if that was never done on this machine. Raises `DeviceError`."""
        driver = Driver()
        made = CudaDevice(planner, device, driver)
        paths = Paths(_table(device, driver))
        self._pinned = Pins(slab, _Registrar(driver, device))
        super().__init__(
            layout, planner, made, slab, pins=self._pinned, paths=paths, threads=threads
        )

    def close(self) -> None:
        """Let go of the slab as well."""
        super().close()
        self._pinned.close()


def _table(device: torch.device, driver: Driver) -> Table:
    name = torch.cuda.get_device_name(device)
    machine = f"{name}, CUDA {torch.version.cuda}, driver {driver.version}"
    notebook = Notebook()
    table = notebook.find(machine)
    if table is None:
        table = calibrate(lambda planner: CudaDevice(planner, device, driver))
        notebook.keep(machine, table)
    return table
