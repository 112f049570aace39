"""Pages that belong to another process: mapped here, on the host or on a GPU."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from lmcache.core.errors import DeviceError, HandoverError
from lmcache.core.kernels.host import HostPages
from lmcache.core.kernels.plan import Planner
from lmcache.core.slab import populate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmcache.core.handover import Lending
    from lmcache.core.kernels.copier import PageCopier
    from lmcache.core.kernels.driver import Driver
    from lmcache.core.layout import PageLayout, Region
    from lmcache.core.slab import Slab

THREADS = 2
WORD_BYTES = 4
WARM_BYTES = 8 << 20


class Borrowed(Protocol):
    """Pages of another process."""

    layout: PageLayout
    """With the addresses they have here."""

    def copier(self, slab: Slab) -> PageCopier:
        """Copies between them and a slab. Raises `HandoverError` if nothing can."""

    def warm(self, is_over: Callable[[], bool]) -> None:
        """Map them before a copy needs it."""

    def close(self) -> None:
        """Unmap them; nothing of ours may use them any more."""


def borrow(lending: Lending, fds: Sequence[int]) -> Borrowed:
    """Maps what is lent, and leaves `fds` open. Raises `HandoverError` if that cannot be."""
    if not lending.handles:
        return BorrowedMemory(lending, fds)
    from lmcache.core.kernels.driver import Driver

    try:
        return BorrowedDevice(lending, Driver())
    except DeviceError as error:
        raise HandoverError(f"cannot use the engine's GPU: {error}") from error


class BorrowedMemory:
    """Pages in the memory of the host."""

    def __init__(self, lending: Lending, fds: Sequence[int]) -> None:
        """Maps what `fds` stand for. Raises `HandoverError`."""
        self._maps: list[mmap.mmap] = []
        moved: list[tuple[int, int, int]] = []
        try:
            for (address, length), fd in zip(lending.spans, fds, strict=True):
                if os.fstat(fd).st_size < length:
                    raise HandoverError("lent memory is shorter than it is said to be")
                mapping = mmap.mmap(fd, length)
                self._maps.append(mapping)
                here = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
                moved.append((address, length, here))
            regions = tuple(_moved(region, moved) for region in lending.layout.regions)
        except (OSError, ValueError) as error:
            raise HandoverError(f"cannot map the lent memory: {error}") from error
        self.layout = replace(lending.layout, regions=regions)
        self._ranges = [(here, length) for _, length, here in moved]

    def copier(self, slab: Slab) -> PageCopier:
        """Threads that copy."""
        return HostPages(Planner(self.layout), slab, THREADS)

    def warm(self, is_over: Callable[[], bool]) -> None:
        """Map it before a copy needs it; it is the lender's memory, and takes no more."""
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        for address, length in self._ranges:
            for start in range(0, length, WARM_BYTES):
                if is_over():
                    return
                populate(address + start, min(WARM_BYTES, length - start))

    def close(self) -> None:
        """It goes with the last reference: no copy may be left without its memory."""


class BorrowedDevice:
    """Pages on a GPU, to which only kernels write, and only while the guard lets them."""

    def __init__(self, lending: Lending, driver: Driver) -> None:
        """Raises `DeviceError`, or `HandoverError` for pages outside of what is lent."""
        self._driver = driver
        self._device = driver.device_with(lending.device)
        self._bases: list[int] = []
        driver.bind(self._device)
        moved: list[tuple[int, int, int]] = []
        try:
            for (address, length), handle in zip(lending.spans, lending.handles, strict=True):
                self._bases.append(driver.open_shared(handle))
                moved.append((address, length, self._bases[-1]))
            regions = tuple(_moved(region, moved) for region in lending.layout.regions)
            self._guard = _here(lending.guard, lending.guard + WORD_BYTES, moved, "the guard")
        except BaseException:
            self.close()
            raise
        self.layout = replace(lending.layout, regions=regions)

    def copier(self, slab: Slab) -> PageCopier:
        """Kernels and the copy engine."""
        try:
            import torch

            from lmcache.core.kernels.cuda import CudaPages

            device, planner = torch.device("cuda", self._device), Planner(self.layout)
            return CudaPages(self.layout, planner, slab, device, THREADS, guard=self._guard)
        except (ImportError, RuntimeError, DeviceError) as error:  # torch raises `RuntimeError`
            raise HandoverError(f"cannot use the engine's GPU: {error}") from error

    def warm(self, is_over: Callable[[], bool]) -> None:
        """It is mapped."""

    def close(self) -> None:
        """Close the handles."""
        self._driver.bind(self._device)
        with ExitStack() as stack:  # an error in one of them must not leak the others
            while self._bases:
                stack.callback(self._driver.close_shared, self._bases.pop())


def _moved(region: Region, spans: list[tuple[int, int, int]]) -> Region:
    """The region at our addresses. Raises `HandoverError` if it does not lie in one span."""
    inside = max(region.run_offsets) + region.run_bytes
    last = region.base + (region.pages - 1) * region.page_stride + inside
    if min(region.run_offsets) < 0:
        raise HandoverError(f"{region.name} lies outside the lent memory")
    return replace(region, base=_here(region.base, last, spans, region.name))


def _here(first: int, last: int, spans: list[tuple[int, int, int]], name: str) -> int:
    """Where the lender's bytes from `first` to `last` begin in this process."""
    for address, length, here in spans:
        if address <= first and last <= address + length:
            return first - address + here
    raise HandoverError(f"{name} lies outside the lent memory")
