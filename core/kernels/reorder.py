"""Copies pages whose objects are in another order than the engine's, word by word.

In plain torch, on any device; not the fast path. Copies and the device wait for each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lmcache.core.kernels.device import as_words
from lmcache.core.kernels.nearby import stay_on_node

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.core.kernels.plan import Planner, Span
    from lmcache.core.layout import PageLayout
    from lmcache.core.slab import Slab


class ReorderedPages:
    """Gathers the words of pages, and scatters them."""

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        places: Sequence[torch.Tensor],
        layout: PageLayout,
        planner: Planner,
        slab: Slab,
    ) -> None:
        """There is one of `tensors` and of `places` for each region.

        `places[i]` is where in a page, counted in elements from its first on, word i of the page's
        share of an object lies. They are on the tensors' device.
        """
        self._planner = planner
        self._layout = layout
        self._places = places
        self._memory = [_flat(tensor) for tensor in tensors]
        self._slab = torch.frombuffer(slab.view, dtype=torch.uint8)

    def mark(self) -> None:
        """A copy waits for all that the device has to do."""

    def copy(
        self, spans: Sequence[Span], region: int | None, *, to_slab: bool, after: object = None
    ) -> int:
        """Copy `spans`, whose payloads are slab offsets; done when this returns."""
        self._planner.pages(spans)  # refuses pages and objects that are out of range
        chosen = range(len(self._memory)) if region is None else (region,)
        self._wait()
        size = sum(
            self._copy_region(span, index, to_slab=to_slab) for span in spans for index in chosen
        )
        self._wait()
        return size

    def stay_near(self) -> None:
        """On the nodes of the engine's main thread."""
        stay_on_node()

    def close(self) -> None:
        """Let go of the slab."""
        self._slab = torch.empty(0, dtype=torch.uint8)

    def _wait(self) -> None:
        device = self._memory[0].device
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)

    def _copy_region(self, span: Span, index: int, *, to_slab: bool) -> int:
        memory, region = self._memory[index], self._layout.regions[index]
        pages = torch.tensor(list(span.pages), dtype=torch.int64, device=memory.device)
        pages *= region.page_stride // memory.element_size()
        at = (pages[:, None] + self._places[index]).ravel()
        start = span.payload + self._planner.object_offset(index, span.first, span.object_pages)
        stored = self._slab[start : start + len(pages) * region.page_bytes].view(memory.dtype)
        if to_slab:
            stored.copy_(memory.index_select(0, at))
        else:
            memory.index_copy_(0, at, stored.to(memory.device))
        return stored.nbytes


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """All words from the first element of the tensor to its last, in the order of memory."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return as_words(tensor).as_strided((1 + sum((n - 1) * step for n, step in steps),), (1,))
