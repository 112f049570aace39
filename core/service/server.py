"""The one thread of the service, and what others have it do."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from lmcache.core.errors import ServiceError
from lmcache.core.log import init_logger
from lmcache.core.service.peers import Peers
from lmcache.core.service.service import Service, Terms

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


class Server:
    """Listens for engines from its making, serves them while `run` runs."""

    def __init__(self, decider: Decider, tiers: Tiers, terms: Terms, endpoint: str) -> None:
        """`endpoint` is `tcp://host:port`. Raises `ServiceError` if it cannot be listened on."""
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._news = selectors.DefaultSelector()
        self._news.register(self._wake_read, selectors.EVENT_READ, self._drain_wakes)
        self.service = Service(decider, tiers, terms, self._wake)
        self._jobs: deque[Callable[[], None]] = deque()
        self._stop = threading.Event()
        try:
            self._peers = Peers(endpoint, self._news, self.service.handle)
        except ServiceError:
            self._close_wakes()
            raise
        self.endpoint = self._peers.endpoint

    def run(self) -> None:
        """Serve until `stop`; then let all engines go."""
        swept, is_waiting = time.monotonic(), False
        try:
            while not self._stop.is_set():
                ready = self._news.select(0 if is_waiting else self._patience_s())
                for key, events in ready:
                    key.data(events)
                is_waiting = self._peers.serve()
                if not ready:  # nobody waits for an answer
                    self._try(self.service.settle)
                self._try(self._send_due)
                if time.monotonic() - swept >= SWEEP_S:
                    self._try(self.service.sweep)
                    self._peers.welcome()
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
        self._peers.close()
        self._close_wakes()

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

    def _send_due(self) -> None:
        for peer, frame in self.service.due():
            self._peers.send(peer, frame)

    def _try(self, what: Callable[[], None]) -> None:
        """An error of ours must not take all engines' server down."""
        try:
            what()
        except Exception:
            logger.exception("in the serving thread")

    def _drain_wakes(self, events: int) -> None:
        self._wake_read.recv(4096)
        while self._jobs:
            self._jobs.popleft()()

    def _wake(self) -> None:
        with suppress(OSError):  # it has been woken often enough, or serves no more
            self._wake_write.send(b"\0")

    def _close_wakes(self) -> None:
        self._news.close()
        self._wake_read.close()
        self._wake_write.close()
