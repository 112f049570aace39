"""Opaque words: what all copies of the kernels are made of, whatever the dtype.

The widest word that divides every address and length is used: 16 bytes where anything can be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from lmcache.core.kernels.plan import Int64s

WORDS = (16, 8, 4, 2, 1)

TILE = 2048
"""Elements a program has under way at once: 16 KiB of them hide the latency of a PCIe bus."""
WARPS = 8
PROGRAMS = 16
"""As many keep a PCIe 5 bus busy; more take multiprocessors from the engine."""


def word_of(*columns: Int64s) -> int:
    """The widest word that divides all of these addresses, strides and lengths, in bytes."""
    bits = 0
    for column in columns:
        bits |= int(np.bitwise_or.reduce(column, axis=None))
    return next(word for word in WORDS if bits % word == 0)


def tile_bytes(word: int) -> int:
    """How many bytes a program copies at once: elements are of at most 8 bytes."""
    return TILE * min(word, 8)


def on_device(table: Int64s, device: torch.device) -> torch.Tensor:
    """A table where kernels can read it, in the order of the stream.

    From pinned memory if it goes to a GPU: else torch would wait for all that the stream is to do
    before, and copies that are to overlap would take turns.
    """
    host = torch.from_numpy(table)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


@triton.jit
def copy_rows(source, target, length, WORD: tl.constexpr, PIECE: tl.constexpr):
    """Copy `length[i]` bytes, at most `PIECE`, from address `source[i]` to address `target[i]`."""
    if WORD >= 8:
        word = tl.int64
    elif WORD == 4:
        word = tl.int32
    elif WORD == 2:
        word = tl.int16
    else:
        word = tl.int8
    SIZE: tl.constexpr = WORD if WORD < 8 else 8
    # a pointer cast from a number says nothing of its alignment
    source = tl.multiple_of(source.to(tl.pointer_type(word)), WORD)[:, None]
    target = tl.multiple_of(target.to(tl.pointer_type(word)), WORD)[:, None]
    column = tl.arange(0, PIECE // SIZE)[None, :]
    mask = column < (length // WORD * (WORD // SIZE))[:, None]
    value = tl.load(source + column, mask=mask, cache_modifier=".cg")
    tl.store(target + column, value, mask=mask, cache_modifier=".cs")
