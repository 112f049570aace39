"""Who copies pages: it depends on where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lmcache.core.errors import LayoutError
from lmcache.core.kernels.host import HostPages
from lmcache.core.kernels.plan import Planner

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lmcache.core.kernels.plan import Span
    from lmcache.core.kernels.staging import Event
    from lmcache.core.layout import PageLayout
    from lmcache.core.slab import Slab


class PageCopier(Protocol):
    """Copies between the pages of one layout and a slab."""

    def mark(self) -> Event | None:
        """What the engine's work on its pages has to reach before a copy of them may begin.

        None if copies are to be made on the engine's own thread.
        """

    def copy(
        self,
        spans: Sequence[Span],
        region: int | None,
        *,
        to_slab: bool,
        after: Event | None = None,
    ) -> int:
        """Copy all regions of `spans`, or one, once `after` is over; return the bytes copied."""

    def stay_near(self) -> None:
        """Keep the calling thread next to where the copies are made, if that can be said."""

    def close(self) -> None:
        """End threads and let go of memory."""


def copier_for(
    layout: PageLayout,
    slab: Slab,
    tensors: Sequence[torch.Tensor],
    threads: int = 2,
    places: Sequence[torch.Tensor] = (),
) -> PageCopier:
    """For pages in `tensors`, one for each region of the layout.

    With `places`, objects are in another order than the pages: see `ReorderedPages`. Raises
    `DeviceError` for a GPU that cannot be used.
    """
    planner = Planner(layout)
    if places:
        from lmcache.core.kernels.reorder import ReorderedPages

        return ReorderedPages(tensors, places, layout, planner, slab)
    device = device_of(tensors)
    if device is None:
        return HostPages(planner, slab, threads)
    if has_cuda(device):
        from lmcache.core.kernels.cuda import CudaPages

        return CudaPages(layout, planner, slab, device, threads)
    from lmcache.core.kernels.device import DevicePages

    return DevicePages(tensors, layout, planner, slab)


def device_of(tensors: Sequence[torch.Tensor]) -> torch.device | None:
    """The one device of all of them; None for the host."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise LayoutError(f"pages lie on several devices: {', '.join(sorted(map(str, devices)))}")
    return next((device for device in devices if device.type != "cpu"), None)


def mark_on(device: torch.device) -> torch.cuda.Event:
    """What the calling thread has queued so far, on torch's current stream."""
    import torch

    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def has_cuda(device: torch.device) -> bool:
    """Whether it is one for our kernels."""
    import torch

    return device.type == "cuda" and torch.version.cuda is not None
