"""Keeps some of the slab ahead of its use mapped and zeroed, off the copying thread.

The first touch of fresh memory costs several times the copy itself. Touching all of it at once
would take the whole budget whether it is needed or not; touching a little more than is used
does neither.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

from lmcache.core.kernels.nearby import stay_on_node

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.core.slab import Slab

AHEAD_BYTES = 256 << 20
PIECE_BYTES = 8 << 20
"""How much is touched between two looks at whether to go on."""


class Warmer:
    """A background thread that follows the highest address in use."""

    def __init__(
        self,
        slab: Slab,
        ahead_bytes: int | None = None,
        *,
        stay_near: Callable[[], None] = stay_on_node,
    ) -> None:
        """By default it keeps `AHEAD_BYTES` ahead.

        `stay_near` keeps the thread on processors next to which the memory is to lie.
        """
        self._slab = slab
        self._stay_near = stay_near
        self._ahead = AHEAD_BYTES if ahead_bytes is None else ahead_bytes
        self._warm = 0
        self._target = min(self._ahead, slab.size)
        self._more = threading.Event()
        self._more.set()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="lmcache-warmer", daemon=True)
        self._thread.start()

    def used(self, end: int) -> None:
        """Memory up to offset `end` is in use."""
        target = min(end + self._ahead, self._slab.size)
        if target > self._target + PIECE_BYTES or target == self._slab.size > self._target:
            self._target = target
            self._more.set()

    def close(self) -> None:
        """Stop; the slab may be unmapped afterwards."""
        self._closed = True
        self._more.set()
        self._thread.join()

    def _run(self) -> None:
        self._stay_near()
        with contextlib.suppress(OSError, AttributeError):  # best effort, and Linux only
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while self._more.wait() and not self._closed:
            self._more.clear()
            while self._warm < self._target and not self._closed:
                piece = min(PIECE_BYTES, self._target - self._warm)
                self._slab.populate(self._warm, piece)
                self._warm += piece
