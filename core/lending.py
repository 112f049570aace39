"""Memory that an engine lends to the process which copies its pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lmcache.core.kernels.copier import device_of, has_cuda
from lmcache.core.lent_memory import LentMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lmcache.core.handover import Lending
    from lmcache.core.kernels.staging import Event
    from lmcache.core.layout import PageLayout


class LentPages(Protocol):
    """Memory that another process may use until it is taken back."""

    takes_back_at_once: bool
    """Whether `take_back` may be called on any thread, whatever else uses the memory."""

    def lend(self, layout: PageLayout) -> tuple[Lending, list[int]]:
        """For one more visitor: what to say, and the descriptors to send with it."""

    def lent_to(self, pid: int) -> None:
        """Whose process it is; 0 if that cannot be seen from here."""

    def mark(self) -> Event | None:
        """As a `Mover` says."""

    def take_back(self) -> None:
        """Return when the visitor cannot write to it any more."""


def lend(tensors: Sequence[torch.Tensor]) -> LentPages:
    """Lend the memory of all these tensors. Raises `LayoutError` if that cannot be."""
    device = device_of(tensors)
    if device is None or not has_cuda(device):
        return LentMemory(tensors)
    from lmcache.core.kernels.driver import Driver
    from lmcache.core.kernels.guard import Guards
    from lmcache.core.lent_device import LentDevice

    return LentDevice(tensors, Driver(), Guards(device))
