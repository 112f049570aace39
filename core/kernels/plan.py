"""From page ids to the runs of bytes to copy."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from lmcache.core.layout import PageLayout, Region

    Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Span:
    """Pages `first` .. `first + len(pages)` of one object, and where they lie in the engine."""

    payload: int
    """Where the object's payload starts: an address, or an offset into a slab."""
    object_pages: int
    """How many pages the object holds."""
    first: int
    """The first page of the object that takes part."""
    pages: Sequence[int]
    """The engine's page ids, in token order."""


@dataclass(frozen=True)
class Runs:
    """Parallel arrays: engine address, object address and length of each run, in bytes."""

    engine: Int64s
    stored: Int64s
    length: Int64s

    @property
    def total_bytes(self) -> int:
        """Sum of all lengths."""
        return int(self.length.sum())


class Planner:
    """Plans copies for one layout. Pure arithmetic: no memory is touched."""

    def __init__(self, layout: PageLayout) -> None:
        self._layout = layout
        self._starts = [0, *accumulate(region.page_bytes for region in layout.regions)]

    def plan(self, spans: Sequence[Span], region: int | None = None) -> Runs:
        """The fewest runs that copy `spans`, for all regions or one of them."""
        chosen = range(len(self._layout.regions)) if region is None else (region,)
        pieces = [self._pieces(span, index) for span in spans for index in chosen]
        if not any(piece[0].size for piece in pieces):
            none = np.empty(0, dtype=np.int64)
            return Runs(none, none, none)
        engine = np.concatenate([piece[0] for piece in pieces])
        stored = np.concatenate([piece[1] for piece in pieces])
        length = np.concatenate([piece[2] for piece in pieces])
        return _merged(engine, stored, length)

    def object_offset(self, index: int, page: int, object_pages: int) -> int:
        """Offset of region `index` of page `page` inside an object of `object_pages` pages."""
        if self._layout.page_major:
            return page * self._layout.page_bytes + self._starts[index]
        return self._starts[index] * object_pages + page * self._layout.regions[index].page_bytes

    def object_stride(self, index: int) -> int:
        """Bytes from one page to the next, for region `index` inside an object."""
        layout = self._layout
        return layout.page_bytes if layout.page_major else layout.regions[index].page_bytes

    def _pieces(self, span: Span, index: int) -> tuple[Int64s, Int64s, Int64s]:
        region: Region = self._layout.regions[index]
        ids = np.asarray(span.pages, dtype=np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < region.pages:
            raise IndexError(f"page ids {ids.min()}..{ids.max()}; the engine has {region.pages}")
        if not 0 <= span.first <= span.object_pages - len(ids):
            raise IndexError(
                f"{len(ids)} pages from {span.first} on; the object has {span.object_pages}"
            )
        inner = np.asarray(region.run_offsets, dtype=np.int64)
        engine = region.base + ids[:, None] * region.page_stride + inner
        start = span.payload + self.object_offset(index, span.first, span.object_pages)
        order = np.arange(len(ids), dtype=np.int64) * self.object_stride(index)
        stored = start + order[:, None] + np.arange(len(inner), dtype=np.int64) * region.run_bytes
        return engine.ravel(), stored.ravel(), np.full(engine.size, region.run_bytes, np.int64)


def _merged(engine: Int64s, stored: Int64s, length: Int64s) -> Runs:
    """Sort by object address and join neighbours that are contiguous on both sides."""
    order = np.argsort(stored, kind="stable")
    engine, stored, length = engine[order], stored[order], length[order]
    joins = (engine[1:] == engine[:-1] + length[:-1]) & (stored[1:] == stored[:-1] + length[:-1])
    heads = np.flatnonzero(np.concatenate(([True], ~joins)))
    return Runs(engine[heads], stored[heads], np.add.reduceat(length, heads))
