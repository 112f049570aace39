"""An engine's connection to the server: calls with a deadline, and none once one was missed.

A server that is slow or gone costs one deadline. From then on calls fail at once, until an answer
of any kind shows that it is back; `look` keeps asking. Only the server's boot id tells a server
that was busy from another one in its place.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from lmcache.core.errors import ServiceError
from lmcache.core.log import init_logger
from lmcache.core.service import wire
from lmcache.core.service.stream import connect

if TYPE_CHECKING:
    from collections.abc import Callable

logger = init_logger(__name__)

CONNECT_S = 2.0
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
        self._stream = connect(endpoint, CONNECT_S)

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
                self._stream.wait(rest)

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
            self._stream.close()

    # ----

    def _send(self, number: int, body: wire.Request) -> None:
        if self.is_lost:
            raise ServiceError("the server is gone")
        message = wire.encode(wire.Call(number, self.session, body))
        try:
            self._stream.send(message)
        except ServiceError:
            self.is_lost = bool(self.session)
            raise

    def _receive(self) -> None:
        """Take in all that has arrived, and send what waits to be taken."""
        if self.is_lost:
            return
        try:
            self._stream.flush()
            while self._stream.read():
                while (message := self._stream.take()) is not None:
                    self._take(wire.decode_answer(message))
        except ServiceError as error:
            logger.debug("the connection to %s ends: %s", self.endpoint, error)
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
