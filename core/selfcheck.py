"""Proves on the engine's own memory that a layout is what we think it is, before it is used.

Each region of one page is written through the engine's tensor and read through the mover, and the
other way round; the pages beside it must not change. What was in the pages is put back.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from lmcache.core.errors import LayoutError
from lmcache.core.geometry import Geometry
from lmcache.core.kernels.copier import copier_for
from lmcache.core.kernels.device import as_words
from lmcache.core.mover import Move, Mover
from lmcache.core.slab import CONTROL_BYTES, Slab

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lmcache.core.layout import PageLayout


def check_layout(
    layout: PageLayout,
    tensors: Sequence[torch.Tensor],
    page_axes: Sequence[int],
    places: Sequence[torch.Tensor] = (),
) -> None:
    """Raise `LayoutError` if a copy of a page is not exactly that page. Only before serving."""
    layout = replace(layout, groups=1)  # all cache groups take their pages from the same memory
    page = layout.num_pages // 2
    first, last = max(0, page - 1), min(layout.num_pages, page + 2)
    nearby = [
        _pages_of(as_words(tensor), axis, layout.num_pages, first, last)
        for tensor, axis in zip(tensors, page_axes, strict=True)
    ]
    own = [
        _pages_of(as_words(tensor), axis, layout.num_pages, page, page + 1)
        for tensor, axis in zip(tensors, page_axes, strict=True)
    ]
    geometry = Geometry(layout.page_tokens, 1, (layout.page_bytes,), bytes(32))
    slab = Slab.create(CONTROL_BYTES + geometry.slot_bytes(1))
    copier = copier_for(layout, slab, tensors, threads=1, places=places)
    mover = Mover(layout, geometry, slab, copier=copier)
    payload = slab.view[CONTROL_BYTES + geometry.payload_offset(0, 1) :]
    kept = [tensor.clone() for tensor in nearby]
    move = Move(CONTROL_BYTES, 0, 1, 0, [page])
    try:
        for value in (0, 1):
            _fill(nearby, 1 - value)
            _fill(own, value)
            mover.store([move], None, mover.mark())
            if bytes(payload[: layout.page_bytes]) != _bytes_of(tensors, layout, value):
                raise LayoutError(f"{layout.kind}: a stored page is not the engine's page {page}")
            _fill(nearby, 1 - value)
            mover.load([move], None, mover.mark())
            for mine, around in zip(own, nearby, strict=True):
                if int((around == value).sum()) != mine.numel() or not (mine == value).all():
                    raise LayoutError(f"{layout.kind}: a load fills other memory than page {page}")
    finally:
        for tensor, before in zip(nearby, kept, strict=True):
            tensor.copy_(before)
        payload.release()
        mover.close()


def _pages_of(
    tensor: torch.Tensor, axis: int, num_pages: int, first: int, last: int
) -> torch.Tensor:
    blocks = tensor.shape[axis] // num_pages
    return tensor.narrow(axis, first * blocks, (last - first) * blocks)


def _fill(tensors: Sequence[torch.Tensor], value: int) -> None:
    for tensor in tensors:
        tensor.fill_(value)


def _bytes_of(tensors: Sequence[torch.Tensor], layout: PageLayout, value: int) -> bytes:
    parts = []
    for tensor, region in zip(tensors, layout.regions, strict=True):
        size = tensor.element_size()
        parts.append(value.to_bytes(size, sys.byteorder) * (region.page_bytes // size))
    return b"".join(parts)
