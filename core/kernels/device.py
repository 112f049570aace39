"""Copies between pages on an accelerator and host memory, in plain torch.

Right on any device torch knows, and ordered by its current stream; not the fast path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lmcache.core.kernels.nearby import stay_on_node

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.core.kernels.plan import Planner, Span
    from lmcache.core.layout import PageLayout, Region
    from lmcache.core.slab import Slab

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DevicePages:
    """Gathers pages of `tensors`, one tensor for each region of the layout, and scatters them."""

    def __init__(
        self, tensors: Sequence[torch.Tensor], layout: PageLayout, planner: Planner, slab: Slab
    ) -> None:
        self._planner = planner
        self._views = [
            _by_page(tensor, region) for tensor, region in zip(tensors, layout.regions, strict=True)
        ]
        self._page_bytes = [region.page_bytes for region in layout.regions]
        self._num_pages = layout.num_pages
        self._slab = torch.frombuffer(slab.view, dtype=torch.uint8)

    def mark(self) -> None:
        """A copy is ordered by the stream anyway."""

    def copy(
        self, spans: Sequence[Span], region: int | None, *, to_slab: bool, after: object = None
    ) -> int:
        """Copy `spans`, whose payloads are slab offsets; done when the current stream is."""
        self._planner.plan(spans, 0)  # refuses pages and objects that are out of range
        chosen = range(len(self._views)) if region is None else (region,)
        size = 0
        for span in spans:
            for index in chosen:
                size += self._copy_region(span, index, to_slab=to_slab)
        return size

    def stay_near(self) -> None:
        """Nobody says where the device is."""
        stay_on_node()

    def close(self) -> None:
        """Let go of the slab."""
        self._slab = torch.empty(0, dtype=torch.uint8)

    def _copy_region(self, span: Span, index: int, *, to_slab: bool) -> int:
        view, page_bytes = self._views[index], self._page_bytes[index]
        ids = torch.tensor(list(span.pages), device=view.device)
        start = span.payload + self._planner.object_offset(index, span.first, span.object_pages)
        stored = self._slab.as_strided(
            (len(ids), page_bytes), (self._planner.object_stride(index), 1), start
        )
        if to_slab:
            pages = view.index_select(0, ids)
            stored.copy_(pages.reshape(len(ids), -1).view(torch.uint8))
        else:
            pages = stored.to(view.device).contiguous().view(view.dtype)
            view.index_copy_(0, ids, pages.reshape(len(ids), *view.shape[1:]))
        return len(ids) * page_bytes


def as_words(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the same size, for which every operation exists."""
    return tensor.view(_WORDS[tensor.element_size()])


def _by_page(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    """The same memory as words, page first, the rest in memory order: an object's own order."""
    size = tensor.element_size()
    words = as_words(tensor)
    shape = [region.pages, *(axis.count for axis in region.axes), region.run_bytes // size]
    strides = [region.page_stride, *(axis.stride for axis in region.axes), size]
    return words.as_strided(shape, [stride // size for stride in strides])
