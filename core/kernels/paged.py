"""Copies between pages and objects, with the addresses computed where the copy is made.

    engine[r, p, j] = base[r] + ids[p] * page_stride[r] + offsets[r, j]
    stored[r, p, j] = payload[p] + start[r] * spread[p] + order[p] * step[r] + places[r, j]

For every region r, page p and run j, `run_bytes` bytes are copied from one to the other. All are
byte addresses that the device can reach: its own memory, or host memory that is registered with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl

from lmcache.core.kernels.guard import enter, leave
from lmcache.core.kernels.words import (
    PROGRAMS,
    WARPS,
    copy_rows,
    on_device,
    tile_bytes,
    word_of,
)

if TYPE_CHECKING:
    from lmcache.core.kernels.plan import Int64s, Pages, Shape

SMALLEST_PIECE = 128
NUMBERS = (
    "n_pages",
    "n_regions",
    "n_runs",
    "run_bytes",
    "first_region",
    "tasks",
    "guard",
)
"""Of which no value is worth a compilation of its own in the middle of serving."""


@triton.jit(do_not_specialize=NUMBERS)
def _paged_kernel(
    pages,  # [4, P] int64: ids, order, payload, spread
    regions,  # [4, R] int64: base, page_stride, start, step
    offsets,  # [R, J] int64
    places,  # [R, J] int64
    n_pages,
    n_regions,
    n_runs,
    run_bytes,
    first_region,
    tasks,
    guard,  # address of an int32, see `guard.py`
    TO_STORED: tl.constexpr,
    GUARDED: tl.constexpr,
    WORD: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
):
    pieces = (run_bytes + PIECE - 1) // PIECE
    if GUARDED:
        tasks = tl.where(enter(guard), tasks, 0)
    for first in range(tl.program_id(0) * ROWS, tasks, tl.num_programs(0) * ROWS):
        task = first + tl.arange(0, ROWS)
        live = task < tasks
        begin = (task % pieces).to(tl.int64) * PIECE
        run = task // pieces % n_runs
        page = task // (pieces * n_runs) % n_pages
        region = first_region + task // (pieces * n_runs * n_pages)
        # everything that is loaded is int64: an id times a stride passes 2**31 on a large pool
        engine = tl.load(regions + region, mask=live, other=0)
        stride = tl.load(regions + n_regions + region, mask=live, other=0)
        engine += tl.load(pages + page, mask=live, other=0) * stride
        engine += tl.load(offsets + region * n_runs + run, mask=live, other=0)
        stored = tl.load(pages + 2 * n_pages + page, mask=live, other=0)
        start = tl.load(regions + 2 * n_regions + region, mask=live, other=0)
        stored += start * tl.load(pages + 3 * n_pages + page, mask=live, other=0)
        step = tl.load(regions + 3 * n_regions + region, mask=live, other=0)
        stored += tl.load(pages + n_pages + page, mask=live, other=0) * step
        stored += tl.load(places + region * n_runs + run, mask=live, other=0)
        length = tl.where(live, tl.minimum(run_bytes - begin, PIECE), 0)
        if TO_STORED:
            copy_rows(engine + begin, stored + begin, length, WORD, PIECE)
        else:
            copy_rows(stored + begin, engine + begin, length, WORD, PIECE)
    if GUARDED:
        leave(guard)


class PagedKernel:
    """Copies pages of one shape of regions, on the device its tables lie on."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        columns = (shape.base, shape.page_stride, shape.start, shape.step)
        self._device = device
        self._regions = torch.from_numpy(np.concatenate(columns, axis=1).T.copy()).to(device)
        self._offsets = torch.from_numpy(shape.offsets).to(device)
        self._places = torch.from_numpy(shape.places).to(device)
        self._run_bytes = shape.run_bytes
        runs = (shape.offsets, shape.places, np.array([shape.run_bytes]))
        self._word = word_of(*columns, *runs)

    def launch(
        self,
        pages: Pages,
        *,
        to_stored: bool,
        regions: range | None = None,
        programs: int = PROGRAMS,
        guard: int = 0,
    ) -> None:
        """Copy `pages` of all regions, or of a range of the shape's; done when the stream is.

        `payload` holds absolute addresses. Entries that stand for several pages are not taken.
        With `guard`, the address of a guard's word, nothing is copied once that has been shut.
        """
        n_regions, n_runs = self._offsets.shape
        chosen = range(n_regions) if regions is None else regions
        word = min(self._word, word_of(pages.payload))
        piece, rows = self._tiling(word)
        tasks = len(chosen) * len(pages.ids) * n_runs * triton.cdiv(self._run_bytes, piece)
        if tasks:
            table = np.stack((pages.ids, pages.order, pages.payload, pages.spread))
            grid = min(programs, triton.cdiv(tasks, rows))
            self._start(table, chosen.start, tasks, grid, word, to_stored=to_stored, guard=guard)

    def warm(self, *, guard: int = 0) -> None:
        """Compile what nearly all launches use, both ways: in the middle of serving it takes long.

        It is one that copies nothing.
        """
        nothing = np.zeros((4, 1), np.int64)
        self._start(nothing, 0, 0, 1, self._word, to_stored=True, guard=0)
        self._start(nothing, 0, 0, 1, self._word, to_stored=False, guard=guard)

    def _tiling(self, word: int) -> tuple[int, int]:
        """Bytes of a piece, and how many pieces a program copies at once."""
        tile = tile_bytes(word)
        piece = min(tile, max(SMALLEST_PIECE, triton.next_power_of_2(self._run_bytes)))
        return piece, tile // piece

    def _start(
        self,
        table: Int64s,
        first_region: int,
        tasks: int,
        grid: int,
        word: int,
        *,
        to_stored: bool,
        guard: int,
    ) -> None:
        n_regions, n_runs = self._offsets.shape
        piece, rows = self._tiling(word)
        _paged_kernel[(grid,)](
            on_device(table, self._device),
            self._regions,
            self._offsets,
            self._places,
            table.shape[1],
            n_regions,
            n_runs,
            self._run_bytes,
            first_region,
            tasks,
            guard,
            TO_STORED=to_stored,
            GUARDED=bool(guard),
            WORD=word,
            PIECE=piece,
            ROWS=rows,
            num_warps=WARPS,
        )
