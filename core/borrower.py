"""In the decider's process: copies the pages that a mover of another process lends."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import threading
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from lmcache.core.errors import HandoverError
from lmcache.core.frames import receive, send
from lmcache.core.handover import CHANNELS
from lmcache.core.lender import ORDERS, Copied, Copy, Finish, Order, Publish
from lmcache.core.log import init_logger
from lmcache.core.mover import Mover
from lmcache.core.slab import populate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmcache.core.geometry import Geometry
    from lmcache.core.handover import Grant, Lending, Visit
    from lmcache.core.layout import Region
    from lmcache.core.slab import Slab

logger = init_logger(__name__)


WARM_BYTES = 8 << 20


class BorrowedPages:
    """Another process's pages, mapped here."""

    def __init__(self, lending: Lending, fds: Sequence[int]) -> None:
        """Maps what `fds` stand for, and leaves them open. Raises `HandoverError`."""
        self._maps: list[mmap.mmap] = []
        moved: list[tuple[int, int, int]] = []
        try:
            for (address, length), fd in zip(lending.spans, fds, strict=True):
                if os.fstat(fd).st_size < length:
                    raise HandoverError("lent memory is shorter than it is said to be")
                mapping = mmap.mmap(fd, length)
                self._maps.append(mapping)
                here = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
                moved.append((address, length, here))
            regions = tuple(_moved(region, moved) for region in lending.layout.regions)
        except (OSError, ValueError) as error:
            raise HandoverError(f"cannot map the lent memory: {error}") from error
        self.layout = replace(lending.layout, regions=regions)
        self._ranges = [(here, length) for _, length, here in moved]

    def warm(self, is_over: Callable[[], bool]) -> None:
        """Map it before a copy needs it; it is the lender's memory, and takes no more."""
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        for address, length in self._ranges:
            for start in range(0, length, WARM_BYTES):
                if is_over():
                    return
                populate(address + start, min(WARM_BYTES, length - start))


def _moved(region: Region, spans: list[tuple[int, int, int]]) -> Region:
    """The region at our addresses. Raises `HandoverError` if it does not lie in one span."""
    inside = max(region.run_offsets) + region.run_bytes
    last = region.base + (region.pages - 1) * region.page_stride + inside
    for address, length, here in spans:
        if address <= region.base and last <= address + length and min(region.run_offsets) >= 0:
            return replace(region, base=region.base - address + here)
    raise HandoverError(f"{region.name} lies outside the lent memory")


class Borrower:
    """Carries out one lender's orders, on threads of its own."""

    def __init__(self, visit: Visit, grant: Grant, geometry: Geometry, slab: Slab) -> None:
        """For a lender that is being visited.

        Raises `HandoverError` for pages that are not where they are said to be.
        """
        hello, fds = visit.hello, visit.take_fds()
        assert hello.lends, "only what is lent can be borrowed"
        with ExitStack() as unused:
            self._channels = [
                unused.enter_context(socket.socket(fileno=fd)) for fd in fds[:CHANNELS]
            ]
            with ExitStack() as mapped:
                for fd in fds[CHANNELS:]:
                    mapped.callback(os.close, fd)
                self._pages = BorrowedPages(hello.lends, fds[CHANNELS:])
            self._mover = Mover(
                self._pages.layout,
                geometry,
                slab.lend(),
                number=grant.word,
                slice_index=hello.slice_index,
                writes=grant.writes,
            )
            unused.pop_all()
        self._threads = [
            threading.Thread(target=self._serve, args=(channel,), name="lmcache-borrower")
            for channel in self._channels
        ]
        self._is_over = threading.Event()
        self._warmer = threading.Thread(
            target=self._pages.warm, args=(self._is_over.is_set,), name="lmcache-borrower-warm"
        )
        for thread in (*self._threads, self._warmer):
            thread.daemon = True
            thread.start()

    def is_silent(self) -> bool:
        """Whether no copy is under way and none will be."""
        return not any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """End; returns when the copies under way have ended."""
        for channel in self._channels:
            with suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)
        self._is_over.set()
        for thread in (*self._threads, self._warmer):
            thread.join()
        for channel in self._channels:
            channel.close()
        self._mover.close()

    def _serve(self, channel: socket.socket) -> None:
        try:
            while True:
                order, _ = receive(channel, ORDERS)
                self._carry_out(order, channel)
        except (OSError, HandoverError, IndexError) as error:
            logger.debug("a lender is gone: %s", error)
        finally:
            with suppress(OSError):  # to the lender it means that nothing is being copied
                channel.shutdown(socket.SHUT_RDWR)

    def _carry_out(self, order: Order, channel: socket.socket) -> None:
        match order:
            case Copy(moves, region, True):
                send(channel, Copied(self._mover.store(moves, region), []))
            case Copy(moves, region, _):
                size, failed = self._mover.load(moves, region)
                bad = {id(move) for move in failed}
                send(channel, Copied(size, [i for i, m in enumerate(moves) if id(m) in bad]))
            case Publish(moves):
                self._mover.publish(moves)
            case Finish(step, spoiled):
                if spoiled:
                    self._mover.spoil(step)
                self._mover.finish(step)
