"""In the decider's process: copies the pages that a mover of another process lends."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from lmcache.core.borrowed import borrow
from lmcache.core.errors import HandoverError, LMCacheError
from lmcache.core.frames import receive, send
from lmcache.core.handover import CHANNELS
from lmcache.core.lender import ORDERS, Copied, Copy, Finish, Order, Publish
from lmcache.core.log import init_logger
from lmcache.core.mover import Mover

if TYPE_CHECKING:
    from lmcache.core.geometry import Geometry
    from lmcache.core.handover import Grant, Visit
    from lmcache.core.slab import Slab

logger = init_logger(__name__)


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
                self._pages = borrow(hello.lends, fds[CHANNELS:])
            unused.callback(self._pages.close)
            memory = slab.lend()
            self._mover = Mover(
                self._pages.layout,
                geometry,
                memory,
                copier=self._pages.copier(memory),
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
        try:
            self._mover.close()
        finally:
            self._pages.close()

    def _serve(self, channel: socket.socket) -> None:
        try:
            while True:
                order, _ = receive(channel, ORDERS)
                self._carry_out(order, channel)
        except (OSError, HandoverError, IndexError) as error:
            logger.debug("a lender is gone: %s", error)
        except LMCacheError as error:
            logger.warning("copies for an engine have ended: %s", error)
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
