"""How an engine lays its KV pages out in memory.

One addressing scheme serves every engine: a *region* (usually one layer) holds a share of every
page; inside the share lie `axes` of equally spaced runs of `run_bytes` contiguous bytes. All of it
is computed from the tensor's strides. What the strides cannot say (which axis counts pages, what
the bytes of a page mean) the adapter says; nothing is inferred from a shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, product
from typing import TYPE_CHECKING

from blake3 import blake3

from lmcache.core.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Axis:
    """`count` equal parts, `stride` bytes apart."""

    count: int
    stride: int


@dataclass(frozen=True)
class Region:
    """Engine memory that holds one share of every page."""

    name: str
    """The engine's name for it, e.g. a layer."""
    base: int
    """Address of page 0's first byte."""
    pages: int
    page_stride: int
    """Bytes from one page to the next."""
    axes: tuple[Axis, ...]
    """Inside a page, outermost in memory first."""
    run_bytes: int
    """Contiguous bytes at each point of `axes`."""
    meaning: str
    """dtype, logical shape and memory order of a page: equal only if the bytes mean the same."""

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of one page in this region."""
        size = self.run_bytes
        for axis in self.axes:
            size *= axis.count
        return size

    @cached_property
    def run_offsets(self) -> list[int]:
        """Offset of each run inside a page, in memory order."""
        ranges = (range(0, axis.count * axis.stride, axis.stride) for axis in self.axes)
        return [sum(point) for point in product(*ranges)]


def region_of(
    name: str,
    base: int,
    shape: Sequence[int],
    strides: Sequence[int],
    *,
    itemsize: int,
    dtype: str,
    page_axis: int,
    blocks_per_page: int = 1,
) -> Region:
    """Describe a tensor whose axis `page_axis` counts blocks, `blocks_per_page` to a page.

    `strides` are in elements, `base` is the address of the first one. Raises `LayoutError` for
    overlapping, reversed or unevenly divided pages.
    """
    blocks, block_stride = shape[page_axis], strides[page_axis] * itemsize
    if 0 in shape or blocks % blocks_per_page:
        raise LayoutError(
            f"{name}: {blocks} blocks of shape {tuple(shape)} do not make whole pages of "
            f"{blocks_per_page}"
        )
    rest = [(n, s) for i, (n, s) in enumerate(zip(shape, strides, strict=True)) if i != page_axis]
    if block_stride <= 0 or any(s <= 0 for n, s in rest if n > 1):
        raise LayoutError(f"{name}: strides {tuple(strides)} repeat or reverse memory")
    logical = [*rest, (blocks_per_page, strides[page_axis])]
    parts = [Axis(n, s * itemsize) for n, s in logical if n > 1]
    axes, run_bytes = _merge(name, parts, itemsize)
    pages, page_stride = blocks // blocks_per_page, block_stride * blocks_per_page
    if pages > 1:  # only to see that pages do not overlap
        _merge(name, [*parts, Axis(pages, page_stride)], itemsize)
    # in memory order, whatever the strides: they may depend on padding and on the number of pages
    order = sorted((i for i, (n, _) in enumerate(logical) if n > 1), key=lambda i: -logical[i][1])
    meaning = f"{dtype} {[n for n, _ in rest]} x{blocks_per_page} in order {order}"
    return Region(
        name=name,
        base=base,
        pages=pages,
        page_stride=page_stride,
        axes=axes,
        run_bytes=run_bytes,
        meaning=meaning,
    )


def _merge(name: str, parts: list[Axis], itemsize: int) -> tuple[tuple[Axis, ...], int]:
    """Sort axes by stride and join those that are contiguous in memory."""
    merged: list[Axis] = [Axis(1, itemsize)]
    for axis in sorted(parts, key=lambda a: a.stride):
        inner = merged[-1]
        extent = inner.count * inner.stride
        if axis.stride < extent:
            raise LayoutError(f"{name}: axes of a page overlap")
        if axis.stride == extent:
            merged[-1] = Axis(inner.count * axis.count, inner.stride)
        else:
            merged.append(axis)
    innermost = merged[0]
    return tuple(reversed(merged[1:])), innermost.count * innermost.stride


@dataclass(frozen=True)
class PageLayout:
    """The pages of one worker: what the movers copy, and what makes copies interchangeable."""

    regions: tuple[Region, ...]
    page_tokens: int
    kind: str
    """Attention backend and the content format of a page, e.g. `CPU_ATTN/AVX512`."""
    groups: int = 1
    """How many pages the same tokens take: one in each of the engine's cache groups."""
    common: str = ""
    """What its objects hold, if that is in an order that engines of several kinds share."""

    def __post_init__(self) -> None:
        if not self.regions:
            raise LayoutError("a layout needs at least one region")
        if self.groups < 1:
            raise LayoutError(f"{self.groups} cache groups")
        if len({region.pages for region in self.regions}) != 1:
            raise LayoutError("regions disagree on the number of pages")

    @property
    def num_pages(self) -> int:
        """How many pages the engine has."""
        return self.regions[0].pages

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of one page over all regions."""
        return sum(region.page_bytes for region in self.regions)

    @property
    def stored_bytes(self) -> int:
        """Bytes stored for the tokens of one page, over all cache groups."""
        return self.groups * self.page_bytes

    @cached_property
    def page_major(self) -> bool:
        """Whether an object keeps a page's regions together, as a page-outermost engine does.

        Otherwise an object keeps a region's pages together. Either way runs stay as long as the
        engine's own memory allows.
        """
        if self.common:
            return False
        bases = [region.base for region in self.regions]
        stride = self.regions[0].page_stride
        return (
            len(bases) > 1
            and all(region.page_stride == stride for region in self.regions)
            and max(bases) - min(bases) < stride
        )

    @cached_property
    def summary(self) -> str:
        """What the bytes of an object mean, as text: equal regions in a row are one line."""
        if self.common:
            return self.common
        order = "page" if self.page_major else "region"
        lines = [f"v1 {self.kind} {self.page_tokens} {order} x{self.groups}"]
        for about, same in groupby(f"{r.page_bytes} {r.meaning}" for r in self.regions):
            lines.append(f"{len(list(same))} x {about}")
        return "\n".join(lines)

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits, equal only if objects of one layout are valid in the other."""
        return fingerprint_of(self.summary)


def fingerprint_of(summary: str) -> str:
    """The fingerprint of a layout with this summary."""
    return blake3(summary.encode()).hexdigest()
