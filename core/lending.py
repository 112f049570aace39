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

    def lend(self, layout: PageLayout, visitor: int) -> tuple[Lending, list[int]]:
        """What to say to a visitor, and the descriptors to send with it.

        `visitor` is his process, 0 if that cannot be seen from here. The last one has left.
        """

    def mark(self) -> Event | None:
        """As a `Mover` says."""

    def take_back(self) -> None:
        """Return when the visitor cannot write to it any more."""


def lendable(tensors: Sequence[torch.Tensor]) -> LentPages:
    """The memory of all these tensors. Raises `LMCacheError` if it cannot be lent."""
    device = device_of(tensors)
    if device is None or not has_cuda(device):
        return LentMemory(tensors)
    from lmcache.core.kernels.driver import Driver
    from lmcache.core.kernels.guard import Guards
    from lmcache.core.lent_device import COUNT, LentDevice

    return LentDevice(tensors, Driver(), Guards(device, COUNT))
