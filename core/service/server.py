"""The socket of the service and the one thread that serves it."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

import zmq

from lmcache.core.errors import ServiceError
from lmcache.core.log import init_logger
from lmcache.core.service.service import Service, Terms
from lmcache.core.service.wire import MAX_MESSAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.core.decider import Decider
    from lmcache.core.tiers import Tiers

logger = init_logger(__name__)

Result = TypeVar("Result")

SWEEP_S = 0.25
FETCH_S = 0.002
"""How often is looked at what slower tiers are to bring."""
LAND_S = 0.01
"""How often, at what movers do: seldom, for it takes time from them, and lookups do it anyway."""
BURST = 64
"""Messages that are served before anything else has its turn."""


class Server:
    """Listens for engines from its making, serves them while `run` runs."""

    def __init__(self, decider: Decider, tiers: Tiers, terms: Terms, endpoint: str) -> None:
        """`endpoint` is ZeroMQ's. Raises `ServiceError` if it cannot be listened on."""
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self.service = Service(decider, tiers, terms, self._wake)
        self._jobs: deque[Callable[[], None]] = deque()
        self._stop = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
        self._socket.setsockopt(zmq.RCVHWM, BURST)  # of one peer; peers take turns
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # an engine that connects anew is the same
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ServiceError(f"cannot listen on {endpoint}: {error}") from error
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def run(self) -> None:
        """Serve until `stop`; then let all engines go."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        swept = time.monotonic()
        try:
            while not self._stop.is_set():
                ready = dict(poller.poll(int(self._patience_s() * 1e3)))
                if self._wake_read.fileno() in ready:
                    self._drain_wakes()
                if self._socket in ready:
                    self._serve_burst()
                else:  # when nobody waits for an answer
                    self._try(self.service.settle)
                self._try(self._send_due)
                if time.monotonic() - swept >= SWEEP_S:
                    self._try(self.service.sweep)
                    swept = time.monotonic()
        finally:
            self.service.close()
            self.close()

    def stop(self) -> None:
        """Have `run` return. Any thread may call it, and a signal's handler."""
        self._stop.set()
        self._wake()

    def close(self) -> None:
        """Listen no more. Again does nothing; `run` does it when it returns."""
        self._context.destroy()
        self._wake_read.close()
        self._wake_write.close()

    def ask(self, function: Callable[[Service], Result], timeout_s: float = 5.0) -> Result:
        """What `function` returns on the thread that serves; for other threads.

        Raises `TimeoutError` if that thread is busy for longer.
        """
        future: Future[Result] = Future()

        def job() -> None:
            try:
                future.set_result(function(self.service))
            except BaseException as error:
                future.set_exception(error)

        self._jobs.append(job)
        self._wake()
        try:
            return future.result(timeout_s)
        except FutureTimeoutError:  # another class than `TimeoutError` before Python 3.11
            raise TimeoutError("the serving thread is busy") from None

    # ----

    def _patience_s(self) -> float:
        if self.service.is_fetching():
            return FETCH_S
        return LAND_S if self.service.is_copying() else SWEEP_S

    def _serve_burst(self) -> None:
        for _ in range(BURST):
            try:
                peer = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            frame = self._socket.recv(zmq.NOBLOCK, copy=False)
            if frame.more:
                self._skip()
            elif answer := self.service.handle(peer, frame.buffer):
                self._send(peer, answer)

    def _send_due(self) -> None:
        for peer, frame in self.service.due():
            self._send(peer, frame)

    def _try(self, what: Callable[[], None]) -> None:
        """An error of ours must not take all engines' server down."""
        try:
            what()
        except Exception:
            logger.exception("in the serving thread")

    def _skip(self) -> None:
        """The rest of a message in more parts than any of ours."""
        while self._socket.recv(zmq.NOBLOCK, copy=False).more:
            pass

    def _send(self, peer: bytes, frame: bytes) -> None:
        try:
            self._socket.send_multipart([peer, frame], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            logger.warning("an engine does not take its answer: %s", error)

    def _drain_wakes(self) -> None:
        self._wake_read.recv(4096)
        while self._jobs:
            self._jobs.popleft()()

    def _wake(self) -> None:
        with suppress(OSError):  # it has been woken often enough, or serves no more
            self._wake_write.send(b"\0")
