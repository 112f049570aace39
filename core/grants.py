"""A worker's pages, and what each attachment of a scheduling side grants for them."""

from __future__ import annotations

import os
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from lmcache.core.geometry import Geometry
from lmcache.core.handover import Door, Grant, Hello, address_of
from lmcache.core.kernels.copier import copier_for
from lmcache.core.lender import Lender
from lmcache.core.lending import lendable
from lmcache.core.log import init_logger
from lmcache.core.mover import Mover
from lmcache.core.pool import DaemonPool
from lmcache.core.slab import Slab

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from lmcache.core.layout import PageLayout
    from lmcache.core.lending import LentPages

logger = init_logger(__name__)

LEAVE_S = 1.0
"""How long a process that wants its memory back is kept waiting for what it has promised."""
OWED_S = 0.01
"""How often we look whether that is still being loaded."""


class Progress:
    """Which steps of one attachment are done: a mover may only answer them in order."""

    def __init__(self, finish: Callable[[int], None]) -> None:
        """`finish(number)` says that this step and all before it are done."""
        self._finish = finish
        self._parts: dict[int, int] = {}
        self._lock = threading.Lock()

    def begin(self, number: int, parts: int) -> None:
        """A step is at hand that is done when `end` has been called `parts` times."""
        with self._lock:
            self._parts[number] = parts

    def end(self, number: int) -> None:
        """A part of a step is done."""
        with self._lock:
            self._parts[number] -= 1
            done = 0
            for step, parts in list(self._parts.items()):
                if parts:
                    break
                del self._parts[step]
                done = step
            if done:
                self._finish(done)


class Granted(NamedTuple):
    """What one attachment gave us."""

    attachment: int
    mover: Mover | Lender
    progress: Progress


class Grants:
    """Waits, on a thread of its own, for whoever schedules. All else is for the main thread."""

    def __init__(
        self,
        *,
        lends: bool = False,
        deadline_s: float = 1.0,
        keeps_s: float = 0.0,
        is_owed: Callable[[], bool] = lambda: False,
    ) -> None:
        """With `lends`, another process makes the copies.

        Each of them may take `deadline_s` and what its bytes take besides. With `keeps_s`, what
        was granted by a process that has died is `kept` for so many seconds. If the process lives
        and waits for us, it is kept for `LEAVE_S`, and then while `is_owed` says that what was
        promised is still being loaded, but no longer than that either.
        """
        self._lends = lends
        self._keeps_s = keeps_s
        self._is_owed = is_owed
        self._kept: Granted | None = None
        self._is_over = threading.Event()
        self._deadline_s = deadline_s
        self.layout: PageLayout | None = None
        self.latest: Granted | None = None
        """By the latest attachment, on the door's thread."""
        self._slice = 0
        self._tensors: list[torch.Tensor] = []
        self._places: list[torch.Tensor] = []
        self._memory: LentPages | None = None
        self._lender: Lender | None = None
        """The latest, whose pages may have to be taken back."""
        self._door: Door | None = None
        self._lock = threading.Lock()
        self._closing = DaemonPool(1, "lmcache-closing")
        """Closes the movers of attachments that ended: pinned memory takes long to let go of."""

    def lend(self, tensors: Sequence[torch.Tensor]) -> None:
        """If they are to be lent, move them to memory that can be, before their layout is read.

        Raises `LMCacheError` if there is none.
        """
        if self._lends:
            self._memory = lendable(tensors)

    def open(
        self,
        engine_id: str,
        number: int,
        layout: PageLayout,
        tensors: Sequence[torch.Tensor],
        *,
        slice_index: int = 0,
        places: Sequence[torch.Tensor] = (),
    ) -> None:
        """Begin to wait, as mover `number` of an engine, with pages in `tensors`.

        With `places`, what is stored is in another order than the pages: see `copier_for`.
        """
        self.layout = layout
        self._slice, self._tensors, self._places = slice_index, list(tensors), list(places)
        hello = Hello(
            number=number,
            page_tokens=layout.page_tokens,
            page_bytes=layout.stored_bytes,
            summary=layout.summary,
            slice_index=slice_index,
            pid=os.getpid(),
        )
        lend = partial(self._memory.lend, layout) if self._memory else None
        self._door = Door(address_of(engine_id, number), hello, self._attach, self._detach, lend)
        logger.info(
            "Registered %d pages of %d tokens, %d bytes each, %s (layout %s)",
            layout.num_pages,
            layout.page_tokens,
            layout.page_bytes,
            layout.kind,
            layout.fingerprint[:12],
        )

    def current(self, attachment: int) -> Granted | None:
        """What this attachment granted, if it is the latest and has not ended."""
        granted = self.latest
        return granted if granted and granted.attachment == attachment else None

    def kept(self, attachment: int) -> Granted | None:
        """What this attachment granted before its process died, to load what it promised.

        Nobody else writes to chunks that were leased, and the memory lasts as long as a mapping.
        """
        granted = self._kept
        return granted if granted and granted.attachment == attachment else None

    def take_back(self) -> None:
        """Between two steps: leave a copier behind that is too slow."""
        if self._lender:
            self._lender.take_back()

    def leave(self) -> None:
        """Stop listening, and have every copy end: those under way at once, all others fail."""
        self._is_over.set()
        if self._door:
            self._door.close()
        self._detach()
        self._forget(self._kept)

    def close(self) -> None:
        """After `leave`: return when the slabs of attachments that have ended are unmapped."""
        self._closing.wait()
        self._closing.close()
        self._closing.join()

    # ----

    def _attach(self, grant: Grant, fds: list[int]) -> None:
        """Map the slab, or ask for copies. Called on the door's thread."""
        mover = self._lender_for(fds) if self._lends else self._mover_for(grant, fds[0])
        self.latest = Granted(grant.attachment, mover, Progress(mover.finish))

    def _mover_for(self, grant: Grant, fd: int) -> Mover:
        assert self.layout is not None, "the door opens after the layout is known"
        geometry = Geometry(
            page_tokens=self.layout.page_tokens,
            pages_per_chunk=grant.pages_per_chunk,
            slices=grant.slices,
            layout=grant.layout,
        )
        slab = Slab(fd, grant.slab_bytes)
        try:
            return Mover(
                self.layout,
                geometry,
                slab,
                number=grant.word,
                slice_index=self._slice,
                writes=grant.writes,
                copier=copier_for(self.layout, slab, self._tensors, places=self._places),
            )
        except BaseException:
            slab.close()
            raise

    def _lender_for(self, channels: list[int]) -> Lender:
        assert self.layout
        assert self._memory
        assert self._door
        self._lender = Lender(
            self.layout,
            channels,
            self._deadline_s,
            memory=self._memory,
            given_up=self._door.hang_up,
        )
        return self._lender

    def _detach(self) -> None:
        """Leave the slab alone, unless only we still have it. Called on the door's thread."""
        granted = self.latest
        if granted and self._keeps_s and self._door:
            self._forget(self._kept)
            self._kept = granted  # before it is the latest no more: somebody may be looking for it
            self.latest = None
            self._keep(granted, for_long=self._door.has_lost)
        elif granted:
            self.latest = None
            self._let_go(granted)

    def _keep(self, granted: Granted, *, for_long: bool) -> None:
        if for_long:
            timer = threading.Timer(self._keeps_s, self._forget, [granted])
            timer.daemon = True
            timer.start()
        else:  # nothing of it is anybody else's before this returns
            deadline = time.monotonic() + self._keeps_s
            self._is_over.wait(LEAVE_S)
            while self._is_owed() and time.monotonic() < deadline:
                if self._is_over.wait(OWED_S):
                    break
            self._forget(granted)

    def _forget(self, granted: Granted | None) -> None:
        """Keep it no longer, if it still is."""
        with self._lock:
            if granted is None or self._kept is not granted:
                return
            self._kept = None
        self._let_go(granted)

    def _let_go(self, granted: Granted) -> None:
        granted.mover.retire()
        self._closing.submit(granted.mover.close)
