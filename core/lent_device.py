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

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lmcache.core.kernels.driver import Driver
    from lmcache.core.kernels.guard import Guards
    from lmcache.core.layout import PageLayout

OUT_S = 5.0
"""In which whoever is in a guard must have come out of it; a kernel takes milliseconds."""
GLANCE_S = 0.0005


class LentDevice:
    """The memory of some tensors of one GPU. For any thread."""

    takes_back_at_once = True

    def __init__(self, tensors: Sequence[torch.Tensor], driver: Driver, guards: Guards) -> None:
        """`guards` lie on the same device. Raises `LayoutError` if that memory has no handles."""
        self._driver = driver
        self._guards = guards
        self._visits = 0
        self._copier = 0
        device = tensors[0].device.index
        driver.bind(device)
        self._identity = driver.identity(device)
        addresses = [tensor.data_ptr() for tensor in tensors]
        try:
            spans = {driver.allocation_of(a) for a in (*addresses, guards.address(0))}
            self._handles = {span: driver.share(span[0]) for span in sorted(spans)}
        except DeviceError as error:
            raise LayoutError(
                f"the GPU's memory cannot be lent: {error}. Expandable segments and engines that "
                "sleep have memory without handles: go without, or use engine_driven"
            ) from error

    def lend(self, layout: PageLayout) -> tuple[Lending, list[int]]:
        """For one more visitor, whom a guard of his own lets in until `take_back`."""
        self._visits += 1
        if self._visits >= self._guards.count:
            raise HandoverError(f"lent {self._visits} times: the engine must be started again")
        lending = Lending(
            layout=layout,
            spans=list(self._handles),
            handles=list(self._handles.values()),
            device=self._identity,
            guard=self._guards.address(self._visits),
        )
        return lending, []

    def lent_to(self, pid: int) -> None:
        """The visitor's process; 0 if it cannot be seen from here."""
        self._copier = pid

    def mark(self) -> torch.cuda.Event:
        """What the engine has queued so far."""
        return self._guards.mark()

    def take_back(self) -> None:
        """Return when the visitor writes to the pages no more. Again does nothing.

        Raises `DeviceError` if one of his kernels does not end.
        """
        self._guards.shut(self._visits)
        deadline = time.monotonic() + OUT_S
        while self._guards.inside(self._visits) and not _is_gone(self._copier):
            if time.monotonic() > deadline:
                raise DeviceError(f"a kernel of process {self._copier} has not ended in {OUT_S} s")
            time.sleep(GLANCE_S)


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
