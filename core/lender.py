"""Where the pages are, if the decider's process copies them: asks for copies, waits for them.

It has the methods of a `Mover`. A copy that takes too long is given up, and with it the lending.
The engine's pages must then be taken back before anything else is done with those that were to be
loaded, for the copier may only have been slow: the thread that runs the engine calls `take_back`
now and then, but for memory of a GPU, which is taken back at once.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from lmcache.core.errors import HandoverError
from lmcache.core.frames import receive, send
from lmcache.core.gate import Gate
from lmcache.core.log import init_logger
from lmcache.core.mover import Move

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lmcache.core.kernels.staging import Event
    from lmcache.core.layout import PageLayout
    from lmcache.core.lending import LentPages

logger = init_logger(__name__)

SLOWEST = 0.5e9
"""Bytes per second that any copier must reach."""
GLANCE_S = 0.05


class Copy(msgspec.Struct, frozen=True, tag=True):
    """Asks for a copy; answered by `Copied`."""

    moves: list[Move]
    region: int | None
    to_slab: bool


class Publish(msgspec.Struct, frozen=True, tag=True):
    """Every region of these slots has been stored."""

    moves: list[Move]


class Finish(msgspec.Struct, frozen=True, tag=True):
    """Every copy of a step has ended."""

    step: int
    spoiled: bool


class Copied(msgspec.Struct, frozen=True):
    """How a copy went."""

    size: int
    failed: list[int]
    """Which of the moves did not find what was promised."""


Order = Copy | Publish | Finish

ORDERS: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_COPIED = msgspec.msgpack.Decoder(Copied)


class _Channel:
    """One socket on which one order at a time is carried out."""

    def __init__(self, fd: int) -> None:
        self.sock = socket.socket(fileno=fd)
        self.busy = threading.Lock()
        self.sending = threading.Lock()

    def send(self, order: Order) -> None:
        with self.sending:
            send(self.sock, order)

    def shut(self) -> None:
        """Have the other side see the end."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


class Lender:
    """A mover whose copies another process makes."""

    def __init__(
        self,
        layout: PageLayout,
        channels: Sequence[int],
        deadline_s: float,
        *,
        memory: LentPages,
        given_up: Callable[[], None],
    ) -> None:
        """Owns the `channels`: sockets for loads and for stores.

        `given_up()` is called once, on any thread, when there will be no more copies.
        """
        self.layout = layout
        self.wants_back = False
        """Whether `take_back` must be called before the engine goes on."""
        self._loads, self._stores = (_Channel(fd) for fd in channels)
        self._deadline_s = deadline_s
        self._memory = memory
        self._on_give_up = given_up
        self._gate = Gate()
        self._has_given_up = False
        self._has_taken_back = False
        self._spoiled = 0
        self._deciding = threading.Lock()

    def mark(self) -> Event | None:
        """As a `Mover` says."""
        return self._memory.mark()

    def store(
        self, moves: Sequence[Move], region: int | None = None, after: Event | None = None
    ) -> int:
        """Have pages copied into slots; the bytes copied, 0 if that did not work."""
        with self._gate.passage() as admitted, self._stores.busy:
            if not admitted or self._has_given_up or not moves:
                return 0
            try:
                copied = self._ask(self._stores, Copy(list(moves), region, to_slab=True), after)
            except (OSError, HandoverError):
                copied = None
            if copied is None:  # whatever comes of it, nobody will say that it is complete
                self._give_up(self._stores)
                return 0
            return copied.size

    def publish(self, moves: Sequence[Move]) -> None:
        """Every region of `moves` has been stored."""
        self._tell(Publish(list(moves)))

    def load(
        self, moves: Sequence[Move], region: int | None = None, after: Event | None = None
    ) -> tuple[int, list[Move]]:
        """Have slots copied into pages: bytes copied, and the moves that failed.

        If the copier is too slow, this returns when it answers or `take_back` has been called;
        memory that `takes_back_at_once` is taken back here. Raises `DeviceError` if it cannot be.
        """
        with self._gate.passage() as admitted, self._loads.busy:
            if not admitted or self._has_given_up or not moves:
                return 0, list(moves)
            try:
                copied = self._ask(self._loads, Copy(list(moves), region, to_slab=False), after)
                while copied is None and not self._memory.takes_back_at_once:
                    self.wants_back = True
                    copied = self._answer(self._loads, time.monotonic() + GLANCE_S)
            except (OSError, HandoverError):
                copied = None
            if copied is None:
                self._give_up(self._loads)
                if self._memory.takes_back_at_once:
                    logger.warning("a copy did not end: taking the pages back")
                    self._memory.take_back()
                return 0, list(moves)
            return copied.size, [moves[i] for i in copied.failed if i < len(moves)]

    def take_back(self) -> None:
        """Leave the copier behind. No thread may use the pages meanwhile."""
        with self._deciding:
            if not self.wants_back:
                return
            logger.warning("a copy takes too long: taking the pages back")
            self._memory.take_back()
            self._has_taken_back, self.wants_back = True, False
            self._give_up(self._loads)

    def spoil(self, step: int) -> None:
        """What was stored in `step` may have been computed from pages without content."""
        self._spoiled = step

    def finish(self, step: int) -> None:
        """Every copy of `step` has ended, one way or the other."""
        self._tell(Finish(step, spoiled=self._spoiled == step))

    def retire(self) -> None:
        """Ask for nothing more; returns when the copy under way has ended."""
        self._gate.shut()
        for channel in (self._loads, self._stores):
            channel.shut()

    def close(self) -> None:
        """Let go of the copier."""
        self.retire()
        with self._deciding:  # a descriptor may be somebody else's once it is closed
            for channel in (self._loads, self._stores):
                channel.sock.close()

    # ----

    def _ask(self, channel: _Channel, order: Copy, after: Event | None) -> Copied | None:
        """The answer to an order, None if it does not come in time."""
        if after:
            after.synchronize()  # the copier's own work does not know the engine's
        pages = sum(len(move.pages) for move in order.moves)
        slack = pages * self.layout.page_bytes / SLOWEST
        channel.send(order)
        return self._answer(channel, time.monotonic() + self._deadline_s + slack)

    def _answer(self, channel: _Channel, deadline: float) -> Copied | None:
        """Raises `HandoverError` once the copier is gone or the pages have been taken back."""
        channel.sock.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            if not channel.sock.recv(1, socket.MSG_PEEK):
                raise HandoverError("the copier is gone")
        except TimeoutError:
            return None
        with self._deciding:
            if channel is self._loads and self._has_taken_back:
                raise HandoverError("the pages have been taken back")
            channel.sock.settimeout(self._deadline_s)
            copied, _ = receive(channel.sock, _COPIED)
            if channel is self._loads:
                self.wants_back = False
            return copied

    def _tell(self, order: Order) -> None:
        with self._gate.passage() as admitted:
            if not admitted or self._has_given_up:
                return
            try:
                self._stores.send(order)
            except OSError:
                self._give_up(self._stores)

    def _give_up(self, channel: _Channel) -> None:
        """The copier sees the channel's end; the other may still be in use."""
        channel.shut()
        if not self._has_given_up:
            self._has_given_up = True
            self._on_give_up()
