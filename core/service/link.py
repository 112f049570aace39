"""An engine's connection to the server: calls with a deadline, and none once one was missed.

A server that is slow or gone costs one deadline. From then on calls fail at once, until an answer
of any kind shows that it is back; `look` keeps asking. Only the server's boot id tells a server
that was busy from another one in its place.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import zmq

from lmcache.core.errors import ServiceError
from lmcache.core.log import init_logger
from lmcache.core.service import wire

if TYPE_CHECKING:
    from collections.abc import Callable

logger = init_logger(__name__)

CONNECT_S = 2.0
QUEUE = 10_000
"""Messages a server may be behind by before we take it for lost."""
LINGER_MS = 100
LARGE = 1 << 16
"""Bytes from which on handing a message over costs less than copying it."""
PING_NUMBER = (1 << 63) - 1
"""The number of every ping: calls count from 1."""


class Link:
    """One socket. Any thread may use it; `lock` makes several calls one."""

    def __init__(self, endpoint: str) -> None:
        """Raises `ServiceError` if nobody listens there."""
        self.endpoint = endpoint
        self.lock = threading.RLock()
        self.session = 0
        self.is_lost = False
        """The server has forgotten us, or is another one: only a new link helps."""
        self.orphan: Callable[[wire.Reply], None] | None = None
        """Is given the answers nobody waits for any more, under the lock."""
        self._boot = b""
        self._numbers = 0
        self._asked: dict[int, wire.Reply | None] = {}
        """The calls somebody waits for, each with its answer once that is here."""
        self._is_slow = False
        self._pinged = False
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE)
        self._socket.setsockopt(zmq.RCVHWM, QUEUE)
        self._socket.setsockopt(zmq.CONNECT_TIMEOUT, int(CONNECT_S * 1e3))
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._news = zmq.Poller()
        for sock in (self._socket, self._monitor):
            self._news.register(sock, zmq.POLLIN)
        try:
            self._socket.connect(endpoint)
            if not self._socket.poll(int(CONNECT_S * 1e3), zmq.POLLOUT):
                raise ServiceError(f"no server listens on {endpoint}")
        except (zmq.ZMQError, ServiceError) as error:
            self.close()
            raise ServiceError(str(error)) from error

    def is_up(self) -> bool:
        """Whether a call is worth making. Never blocks."""
        return not self.is_lost and not self._is_slow

    def tell(self, body: wire.Request) -> None:
        """Send what has no answer. Raises `ServiceError` if it cannot be sent; the link is lost."""
        with self.lock:
            self._send(0, body)

    def begin(self, body: wire.Request) -> int:
        """Send a call and return its number, for `poll`. Raises `ServiceError` like `tell`."""
        with self.lock:
            if not self.is_up():
                raise ServiceError("the server does not answer")
            self._numbers += 1
            self._send(self._numbers, body)
            self._asked[self._numbers] = None
            return self._numbers

    def poll(self, number: int, wait_s: float) -> wire.Reply | None:
        """The answer to a call, if it comes within `wait_s`; each answer is given out once."""
        deadline = time.monotonic() + wait_s
        with self.lock:
            while True:
                self._receive()
                answer = self._asked.get(number)
                if answer is not None:
                    self._asked[number] = None
                    return answer
                if self.is_lost or (rest := deadline - time.monotonic()) <= 0:
                    return None
                self._news.poll(max(1, int(rest * 1e3)))

    def end(self, number: int) -> None:
        """Nobody waits for this call any more; an answer nobody has taken is an orphan."""
        with self.lock:
            answer = self._asked.pop(number, None)
            if answer is not None and self.orphan:
                self.orphan(answer)

    def call(self, body: wire.Request, timeout_s: float) -> wire.Reply:
        """Send and wait for the answer. Raises `ServiceError` if it does not come in time."""
        number = self.begin(body)
        try:
            answer = self.poll(number, timeout_s)
        finally:
            self.end(number)
        if answer is None and self.is_lost:
            raise ServiceError(f"the server at {self.endpoint} is gone")
        if answer is None:
            self.late()
            raise ServiceError(f"no answer from {self.endpoint} within {timeout_s} s")
        return answer

    def late(self) -> None:
        """A deadline was missed: no more calls until an answer comes."""
        if not self._is_slow:
            logger.warning("the server at %s does not answer; computing instead", self.endpoint)
        self._is_slow = True

    def look(self) -> bool:
        """Whether the server still knows us, as far as we can tell; asks it again. Never blocks."""
        if self.lock.acquire(blocking=False):
            try:
                self._receive()
                if not self._pinged and not self.is_lost:
                    self._pinged = True
                    self._send(PING_NUMBER, wire.Ping())
            except ServiceError:
                self.is_lost = True
            finally:
                self.lock.release()
        return not self.is_lost

    def close(self) -> None:
        """Disconnect. What was sent may still arrive."""
        with self.lock:
            self.is_lost = True
            if not self._context.closed:
                self._socket.disable_monitor()
                self._context.destroy(linger=LINGER_MS)

    # ----

    def _send(self, number: int, body: wire.Request) -> None:
        if self.is_lost:
            raise ServiceError("the server is gone")
        try:
            frame = wire.encode(wire.Call(number, self.session, body))
            self._socket.send(frame, zmq.NOBLOCK, copy=len(frame) < LARGE)
        except zmq.ZMQError as error:
            self.is_lost = bool(self.session)
            raise ServiceError(f"nothing can be sent to {self.endpoint}: {error}") from error

    def _receive(self) -> None:
        """Take in all that has arrived."""
        if self.is_lost:
            return
        while _is_readable(self._socket):
            try:
                self._take(wire.decode_answer(self._socket.recv(zmq.NOBLOCK)))
            except ServiceError as error:
                logger.warning("the server at %s is not understood: %s", self.endpoint, error)
                self.is_lost = True
                return
        if _is_readable(self._monitor):
            self.is_lost = True

    def _take(self, answer: wire.Answer) -> None:
        if self._boot and answer.boot != self._boot:
            self.is_lost = True
            return
        self._boot = answer.boot
        if self._is_slow:
            logger.info("the server at %s answers again", self.endpoint)
        self._is_slow = False
        if isinstance(answer.body, wire.Unknown):
            self.is_lost = True
        if answer.number == PING_NUMBER:
            self._pinged = False
        elif answer.number in self._asked:
            self._asked[answer.number] = answer.body
        elif self.orphan:
            self.orphan(answer.body)


def _is_readable(sock: zmq.Socket[bytes]) -> bool:
    """Like `poll(0)`, at a tenth of its cost."""
    return bool(int(sock.get(zmq.EVENTS)) & zmq.POLLIN)
