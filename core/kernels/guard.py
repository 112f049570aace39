"""A word of device memory that says whether another process's kernels may still write to ours.

Programs count themselves in before they write and out when they have written. Who lends memory
shuts the guard by its top bit: whatever comes in from then on writes nothing, and once the count
is zero nobody writes any more. It works whether the other process lives, hangs or was stopped
between two of its calls; only if it dies in the middle of a kernel the count stays as it was.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SHUT = -(1 << 31)
WORDS_APART = 4
"""So that all are aligned alike, and one compilation does for them."""


@triton.jit
def enter(guard):
    """Whether the program may write; either way it has to `leave`."""
    word = guard.to(tl.pointer_type(tl.int32))
    return tl.atomic_add(word, 1, sem="acquire", scope="sys") >= 0


@triton.jit
def leave(guard):
    """All that the program has written is there before it counts itself out."""
    tl.debug_barrier()  # the release is one thread's: it speaks for those it has met
    word = guard.to(tl.pointer_type(tl.int32))
    tl.atomic_add(word, -1, sem="release", scope="sys")


@triton.jit
def shut_kernel(word, BIT: tl.constexpr):
    """One program: let nobody in any more."""
    tl.atomic_or(word, BIT, sem="acq_rel", scope="sys")


class Guards:
    """Words on one device. For any thread."""

    def __init__(self, device: torch.device, count: int) -> None:
        self._words = torch.zeros(count, WORDS_APART, dtype=torch.int32, device=device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        torch.cuda.current_stream(device).synchronize()

    def address(self, number: int) -> int:
        """Where a word is."""
        return self._words[number].data_ptr()

    def shut(self, number: int) -> None:
        """Let nobody in any more."""
        with torch.cuda.stream(self._stream):
            shut_kernel[(1,)](self._words[number], BIT=SHUT)

    def inside(self, number: int) -> int:
        """How many programs are in."""
        with torch.cuda.stream(self._stream):
            return int(self._words[number, 0].item()) & ~SHUT
