"""Copies any runs of bytes: target[i] <- source[i], length[i] bytes, for every i."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import triton
import triton.language as tl

from lmcache.core.kernels.words import (
    PROGRAMS,
    WARPS,
    copy_rows,
    on_device,
    tile_bytes,
    word_of,
)

if TYPE_CHECKING:
    import torch

    from lmcache.core.kernels.plan import Int64s


@triton.jit(do_not_specialize=["count"])
def _runs_kernel(
    runs,  # [3, N] int64: source, target, length
    count,
    WORD: tl.constexpr,
    PIECE: tl.constexpr,
):
    row = tl.arange(0, 1)
    for run in range(tl.program_id(0), count, tl.num_programs(0)):
        source = tl.load(runs + run + row)
        target = tl.load(runs + count + run + row)
        length = tl.load(runs + 2 * count + run)
        for begin in range(0, length, PIECE):
            left = tl.minimum(length - begin, PIECE)
            copy_rows(source + begin, target + begin, left + row, WORD, PIECE)


def copy_runs(
    target: Int64s,
    source: Int64s,
    length: Int64s,
    device: torch.device,
    *,
    programs: int = PROGRAMS,
) -> None:
    """Copy run i from address `source[i]` to address `target[i]`; done when the stream is.

    No run may overlap another's target.
    """
    if not len(length):
        return
    word = word_of(target, source, length)
    _runs_kernel[(min(programs, len(length)),)](
        on_device(np.stack((source, target, length)), device),
        len(length),
        WORD=word,
        PIECE=tile_bytes(word),
        num_warps=WARPS,
    )
