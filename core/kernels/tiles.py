"""Cuts what is to be copied into tiles: parts of objects that fit a buffer.

Inside a buffer lie objects of their own, made of only those pages and regions that the tile has.
So one kernel serves both, and what lies between buffer and slab is a few long extents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lmcache.core.kernels.plan import Pages

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lmcache.core.kernels.plan import Int64s, Planner, Span
    from lmcache.core.layout import PageLayout

ALIGNMENT = 256
"""Of each object in a buffer, so that words are as wide as the object allows."""


class Extent(NamedTuple):
    """Bytes that lie together in the buffer and in the slab."""

    buffer: int
    stored: int
    length: int


@dataclass(frozen=True)
class Tile:
    """What one buffer holds at a time."""

    regions: range
    """Of the layout."""
    pages: Pages
    """Their payloads are offsets into the buffer."""
    extents: list[Extent]
    size: int
    """Bytes of the buffer that are in use."""


class _Cut(NamedTuple):
    """Some pages and regions of one span."""

    span: Span
    """Of those pages only."""
    regions: range
    size: int


class Tiler:
    """Cuts spans of one layout."""

    def __init__(self, planner: Planner, layout: PageLayout, tile_bytes: int) -> None:
        """`tile_bytes` is a wish: the least that makes sense is one page of one region."""
        self._planner = planner
        self._page_major = layout.page_major
        self._page_bytes = [region.page_bytes for region in layout.regions]
        least = layout.page_bytes if layout.page_major else max(self._page_bytes)
        self.tile_bytes = max(tile_bytes, least + ALIGNMENT)
        self._starts = [planner.object_offset(i, 0, 1) for i in range(len(layout.regions))]
        self._starts.append(layout.page_bytes)

    def tiles(self, spans: Sequence[Span], region: int | None = None) -> Iterator[Tile]:
        """The tiles of `spans`, for all regions or one. Their payloads are slab offsets."""
        chosen = range(len(self._page_bytes)) if region is None else range(region, region + 1)
        together: list[_Cut] = []
        size = 0
        for span in spans:
            for cut in self._cuts(span, chosen):
                if together and (
                    cut.regions != together[0].regions or size + cut.size > self.tile_bytes
                ):
                    yield self._tile(together)
                    together, size = [], 0
                together.append(cut)
                size += cut.size
        if together:
            yield self._tile(together)

    def _cuts(self, span: Span, chosen: range) -> Iterator[_Cut]:
        """By region as long as all pages fit, then by page."""
        count = len(span.pages)
        room = self.tile_bytes - ALIGNMENT
        for regions in self._groups(chosen, max(1, room // max(count, 1))):
            width = self._width(regions)
            at_once = max(1, room // width)
            for first in range(0, count, at_once):
                pages = span.pages[first : first + at_once]
                part = replace(span, first=span.first + first, pages=pages)
                yield _Cut(part, regions, -(-width * len(pages) // ALIGNMENT) * ALIGNMENT)

    def _groups(self, chosen: range, most: int) -> Iterator[range]:
        """Ranges of regions, of which one page takes at most so many bytes, or single ones."""
        first = chosen.start
        for region in chosen:
            wide = self._starts[region + 1] - self._starts[first] > most
            if wide and region > first and not self._page_major:
                yield range(first, region)
                first = region
        yield range(first, chosen.stop)

    def _width(self, regions: range) -> int:
        """Bytes of one page in a buffer."""
        if self._page_major:  # all regions have their places, whether they are copied or not
            return self._starts[-1]
        return self._starts[regions.stop] - self._starts[regions.start]

    def _tile(self, cuts: list[_Cut]) -> Tile:
        regions = cuts[0].regions
        own, at = [], 0
        extents: list[Extent] = []
        for cut in cuts:
            count = len(cut.span.pages)
            spread = 1 if self._page_major else count
            own.append((at - self._origin(regions) * spread, spread, count))
            extents += self._extents(cut, at)
            at += cut.size
        payload, spread, counts = np.array(own, np.int64).T
        ids = [np.array(cut.span.pages, np.int64) for cut in cuts]
        order = [np.arange(len(part), dtype=np.int64) for part in ids]
        pages = Pages(
            np.concatenate(ids),
            np.concatenate(order),
            payload.repeat(counts),
            spread.repeat(counts),
            np.ones(counts.sum(), np.int64),
        )
        return Tile(regions, pages, extents, at)

    def _origin(self, regions: range) -> int:
        """Where the first region would begin if the buffer held the other regions as well."""
        return 0 if self._page_major else self._starts[regions.start]

    def _extents(self, cut: _Cut, at: int) -> Iterator[Extent]:
        span, regions, _ = cut
        count = len(span.pages)
        if self._page_major:
            yield from self._page_extents(cut, at)
        elif count == span.object_pages:
            start = span.payload + self._starts[regions.start] * count
            yield Extent(at, start, self._width(regions) * count)
        else:
            for region in regions:
                offset = self._planner.object_offset(region, span.first, span.object_pages)
                yield Extent(at, span.payload + offset, self._page_bytes[region] * count)
                at += self._page_bytes[region] * count

    def _page_extents(self, cut: _Cut, at: int) -> Iterator[Extent]:
        span, regions, _ = cut
        count, step = len(span.pages), self._starts[-1]
        start = span.payload + span.first * step
        if len(regions) == len(self._page_bytes):
            yield Extent(at, start, count * step)
            return
        [region] = regions
        inner = self._starts[region]
        for page in range(count):
            offset = page * step + inner
            yield Extent(at + offset, start + offset, self._page_bytes[region])


def absolute(pages: Pages, address: int) -> Pages:
    """The same pages, their payloads counted from `address`."""
    return pages._replace(payload=pages.payload + np.int64(address))


def columns(extents: Sequence[Extent]) -> tuple[Int64s, Int64s, Int64s]:
    """Offset in the buffer, in the slab, and length of each."""
    buffer, stored, length = np.array(extents, np.int64).T
    return buffer, stored, length
