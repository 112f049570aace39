"""An engine's pages on a GPU, for another process to copy, and a guard that keeps it out again.

The other process maps whole allocations, and writes to them only in kernels that pass the guard.
Taking back shuts the guard: memory of a GPU cannot be swapped for other memory at its address.
"""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING

from lmcache.core.errors import DeviceError, HandoverError, LayoutError
from lmcache.core.handover import Lending
from lmcache.core.kernels.copier import mark_on

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lmcache.core.kernels.driver import Driver
    from lmcache.core.kernels.guard import Guards
    from lmcache.core.kernels.staging import Event
    from lmcache.core.layout import PageLayout

OUT_S = 5.0
"""In which whoever is in a guard must have come out of it."""
COUNT = 1 << 16
"""How many guards there are."""
GLANCE_S = 0.0005


class LentDevice:
    """The memory of some tensors of one GPU. For any thread."""

    takes_back_at_once = True

    def __init__(self, tensors: Sequence[torch.Tensor], driver: Driver, guards: Guards) -> None:
        """`guards` lie on the same device. Raises `LayoutError` if that memory has no handles."""
        self._driver = driver
        self._guards = guards
        self._word = 1
        """The guard of whoever is lent to next; one that was shut is never used again."""
        self._visitor = 0
        self._device = tensors[0].device
        guards.shut(0)  # compiles it, before somebody waits for that
        driver.bind(self._device.index)
        self._identity = driver.identity(self._device.index)
        addresses = [tensor.data_ptr() for tensor in tensors]
        try:
            spans = {driver.allocation_of(a) for a in (*addresses, guards.address(0))}
            self._handles = {span: driver.share(span[0]) for span in sorted(spans)}
        except DeviceError as error:
            raise LayoutError(
                f"the GPU's memory cannot be lent: {error}. Expandable segments and engines that "
                "sleep have memory without handles: go without, or use engine_driven"
            ) from error

    def lend(self, layout: PageLayout, visitor: int) -> tuple[Lending, list[int]]:
        """For one more visitor, whom a guard lets in until `take_back`; the last one has left."""
        self._visitor = visitor
        while self._word < COUNT and self._guards.inside(self._word):
            self._word += 1  # of a visitor that died inside
        if self._word == COUNT:
            raise HandoverError(f"taken back {COUNT} times: the engine must be started again")
        lending = Lending(
            layout=layout,
            spans=list(self._handles),
            handles=list(self._handles.values()),
            device=self._identity,
            guard=self._guards.address(self._word),
        )
        return lending, []

    def mark(self) -> Event:
        """What the engine has queued so far."""
        return _Mark(mark_on(self._device), self._driver, self._device.index)

    def take_back(self) -> None:
        """Return when the visitor writes to the pages no more.

        Raises `DeviceError` if one of his kernels does not end.
        """
        word, self._word = self._word, self._word + 1
        self._guards.shut(word)
        deadline = time.monotonic() + OUT_S
        while self._guards.inside(word) and not _is_gone(self._visitor):
            if time.monotonic() > deadline:
                raise DeviceError(f"a kernel of process {self._visitor} has not ended in {OUT_S} s")
            time.sleep(GLANCE_S)


class _Mark:
    """An event, for threads that have nothing else to do with the device."""

    def __init__(self, event: Event, driver: Driver, device: int) -> None:
        self._event = event
        self._driver = driver
        self._device = device

    def synchronize(self) -> None:
        """On the right device: waiting would otherwise take memory of the first one."""
        self._driver.bind(self._device)
        self._event.synchronize()


def _is_gone(pid: int) -> bool:
    """Whether a process has ended, and with it all that it had queued on a GPU."""
    if not pid or not hasattr(os, "pidfd_open"):
        return False
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], 0)[0])
    finally:
        os.close(fd)
