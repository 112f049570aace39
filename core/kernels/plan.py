"""From page ids to the runs of bytes to copy."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from lmcache.core.layout import PageLayout

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


class Pages(NamedTuple):
    """The pages of all spans, one after the other."""

    ids: Int64s
    order: Int64s
    """Which page of its object each is."""
    payload: Int64s
    spread: Int64s
    """What a region's share of one page is multiplied with, to find where its pages begin."""
    stands_for: Int64s
    """How many neighbouring pages each entry is."""

    def joined(self) -> Pages:
        """The same pages, those that follow each other on both sides as one."""
        follows = (np.diff(self.ids) == 1) & (np.diff(self.order) == 1)
        follows &= np.diff(self.payload) == 0
        heads = np.flatnonzero(np.concatenate(([True], ~follows)))
        first = Pages(*(column[heads] for column in self))
        return first._replace(stands_for=np.add.reduceat(self.stands_for, heads))


class Shape:
    """Regions whose pages are made of equal runs, as columns."""

    def __init__(self, layout: PageLayout, starts: list[int], members: list[int]) -> None:
        regions = [layout.regions[i] for i in members]
        self.members = members
        self.run_bytes = regions[0].run_bytes
        self.base = _column(region.base for region in regions)
        self.page_stride = _column(region.page_stride for region in regions)
        self.offsets = np.array([region.run_offsets for region in regions], np.int64)
        """Of each run inside a page: a row for each region."""
        self.places = np.broadcast_to(
            np.arange(self.offsets.shape[1], dtype=np.int64) * self.run_bytes, self.offsets.shape
        ).copy()
        """Of each run inside a page of an object: an object keeps the engine's own order."""
        self.start = _column(starts[i] for i in members)
        """Where a region's share of an object begins, if the object held one page."""
        self.step = _column(
            layout.page_bytes if layout.page_major else region.page_bytes for region in regions
        )
        """From one page of an object to the next."""
        strides = np.concatenate((self.page_stride, self.step))
        self.is_dense = self.offsets.shape[1] == 1 and bool((strides == self.run_bytes).all())
        """Whether neighbouring pages are one run."""

    def with_runs(self, offsets: Int64s, places: Int64s, run_bytes: int) -> Shape:
        """The same regions, their pages cut otherwise or in another order."""
        other = copy(self)
        other.offsets, other.places, other.run_bytes = offsets, places, run_bytes
        other.is_dense = False
        return other

    def place(self, pages: Pages, region: int | None = None) -> tuple[Int64s, Int64s, Int64s]:
        """Engine address, object address and length of every run of `pages`."""
        rows = slice(None) if region is None else [self.members.index(region)]
        engine = self.base[rows] + pages.ids * self.page_stride[rows]
        stored = pages.payload + self.start[rows] * pages.spread + pages.order * self.step[rows]
        engine = engine[:, :, None] + self.offsets[rows][:, None, :]
        stored = stored[:, :, None] + self.places[rows][:, None, :]
        length = np.broadcast_to(pages.stands_for[:, None] * self.run_bytes, engine.shape)
        return engine.ravel(), stored.ravel(), length.ravel()


class Planner:
    """Plans copies for one layout. Pure arithmetic: no memory is touched."""

    def __init__(self, layout: PageLayout) -> None:
        self._layout = layout
        self._starts = [0, *accumulate(region.page_bytes for region in layout.regions)]
        alike: dict[tuple[int, int], list[int]] = {}
        for index, region in enumerate(layout.regions):
            alike.setdefault((region.run_bytes, len(region.run_offsets)), []).append(index)
        self.shapes = [Shape(layout, self._starts, members) for members in alike.values()]

    def plan(self, spans: Sequence[Span], region: int | None = None) -> Runs:
        """The fewest runs that copy `spans`, for all regions or one of them."""
        pages = self.pages(spans)
        if not len(pages.ids):
            none = np.empty(0, dtype=np.int64)
            return Runs(none, none, none)
        joined = pages.joined()
        pieces = [
            shape.place(joined if shape.is_dense else pages, region)
            for shape in self.shapes
            if region is None or region in shape.members
        ]
        engine, stored, length = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return _merged(engine, stored, length)

    def object_offset(self, index: int, page: int, object_pages: int) -> int:
        """Offset of region `index` of page `page` inside an object of `object_pages` pages."""
        spread = 1 if self._layout.page_major else object_pages
        return self._starts[index] * spread + page * self.object_stride(index)

    def object_stride(self, index: int) -> int:
        """Bytes from one page to the next, for region `index` inside an object."""
        layout = self._layout
        return layout.page_bytes if layout.page_major else layout.regions[index].page_bytes

    def pages(self, spans: Sequence[Span]) -> Pages:
        """The pages of `spans`. Raises `IndexError` if the engine or the object lacks one."""
        for span in spans:
            if not 0 <= span.first <= span.object_pages - len(span.pages):
                raise IndexError(
                    f"{len(span.pages)} pages from {span.first} on; "
                    f"the object has {span.object_pages}"
                )
        counts = [len(span.pages) for span in spans]
        ids = np.fromiter(chain.from_iterable(span.pages for span in spans), np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._layout.num_pages:
            raise IndexError(
                f"page ids {ids.min()}..{ids.max()}; the engine has {self._layout.num_pages}"
            )
        spread = [1 if self._layout.page_major else span.object_pages for span in spans]
        order = chain.from_iterable(
            range(span.first, span.first + count) for span, count in zip(spans, counts, strict=True)
        )
        return Pages(
            ids,
            np.fromiter(order, np.int64),
            np.repeat(np.array([span.payload for span in spans], np.int64), counts),
            np.repeat(np.array(spread, np.int64), counts),
            np.ones(len(ids), np.int64),
        )


def _column(values: Iterable[int]) -> Int64s:
    return np.fromiter(values, np.int64)[:, None]


def _merged(engine: Int64s, stored: Int64s, length: Int64s) -> Runs:
    """Sort by object address and join neighbours that are contiguous on both sides."""
    order = np.argsort(stored, kind="stable")
    engine, stored, length = engine[order], stored[order], length[order]
    joins = (engine[1:] == engine[:-1] + length[:-1]) & (stored[1:] == stored[:-1] + length[:-1])
    heads = np.flatnonzero(np.concatenate(([True], ~joins)))
    return Runs(engine[heads], stored[heads], np.add.reduceat(length, heads))
