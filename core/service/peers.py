"""The server's connections: whose turn it is to be answered, and who is behind."""

from __future__ import annotations

import selectors
import socket
from contextlib import suppress
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from lmcache.core.errors import ServiceError
from lmcache.core.log import init_logger
from lmcache.core.service.stream import Stream, parse_endpoint

if TYPE_CHECKING:
    from collections.abc import Callable

logger = init_logger(__name__)

MAX_PEERS = 256
"""Each costs a descriptor, and memory that whoever connects can fill."""
TURN = 64
"""Messages of one peer that are answered before anything else has its turn."""


class Peers:
    """Listens from its making; all else happens on the thread that waits for `news`."""

    def __init__(
        self,
        endpoint: str,
        news: selectors.BaseSelector,
        answer: Callable[[int, memoryview], bytes | None],
    ) -> None:
        """`answer` is given a peer's number and a message, which is gone when it returns.

        Each key of `news` has what is to be called with its events for its data.
        Raises `ServiceError` if `endpoint`, `tcp://host:port`, cannot be listened on.
        """
        self._listener = _listen(endpoint)
        host, port = self._listener.getsockname()[:2]
        self.endpoint = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
        self._news = news
        self._answer = answer
        self._numbers = count(1)
        self._streams: dict[int, Stream] = {}
        self._waiting: set[int] = set()
        """Those who have said something, and have not had their turn or need another."""
        self.welcome()

    def welcome(self) -> None:
        """Let engines in, again if that failed."""
        if self._listener not in self._news.get_map():
            self._news.register(self._listener, selectors.EVENT_READ, self._let_in)

    def serve(self) -> bool:
        """Give everyone who has said something a turn; whether somebody needs another."""
        for number in list(self._waiting):
            self._take_turn(number)
        return bool(self._waiting)

    def send(self, number: int, message: bytes) -> None:
        """Send to a peer, if it is still there."""
        if stream := self._streams.get(number):
            try:
                stream.send(message)
            except ServiceError as error:
                self._part(number, error)
            else:
                self._listen_to(number)

    def close(self) -> None:
        """Part with all, and listen no more."""
        for number in list(self._streams):
            self._part(number)
        self._listener.close()

    # ----

    def _let_in(self, events: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:  # of descriptors, say, which others may give back
            logger.warning("cannot let an engine in: %s", error)
            self._news.unregister(self._listener)
            return
        if len(self._streams) >= MAX_PEERS:
            logger.warning("there are %d connections already", MAX_PEERS)
            sock.close()
            return
        number = next(self._numbers)
        stream = self._streams[number] = Stream(sock)
        self._news.register(stream, selectors.EVENT_READ, partial(self._attend, number))

    def _attend(self, number: int, events: int) -> None:
        stream = self._streams[number]
        try:
            if events & selectors.EVENT_WRITE:
                stream.flush()
            elif number not in self._waiting:
                stream.read()
        except ServiceError as error:
            self._part(number, error)
        else:
            self._waiting.add(number)

    def _take_turn(self, number: int) -> None:
        """Answer what has been read; who does not take the answers is not answered more."""
        stream = self._streams[number]
        self._waiting.discard(number)
        try:
            for _ in range(TURN):
                message = None if stream.is_behind else stream.take()
                if message is None:
                    break
                if reply := self._answer(number, message):
                    stream.send(reply)
            else:
                self._waiting.add(number)
        except ServiceError as error:
            self._part(number, error)
        else:
            self._listen_to(number)

    def _listen_to(self, number: int) -> None:
        """Nothing is read of a peer before it has taken what it was sent."""
        stream = self._streams[number]
        wanted = selectors.EVENT_WRITE if stream.is_behind else selectors.EVENT_READ
        key = self._news.get_key(stream)
        if key.events != wanted:
            self._news.modify(stream, wanted, key.data)

    def _part(self, number: int, why: ServiceError | None = None) -> None:
        logger.debug("connection %d ends: %s", number, why)
        stream = self._streams.pop(number)
        self._waiting.discard(number)
        with suppress(KeyError):
            self._news.unregister(stream)
        stream.close()


def _listen(endpoint: str) -> socket.socket:
    host, port = parse_endpoint(endpoint)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=MAX_PEERS)
    except (OSError, UnicodeError) as error:
        raise ServiceError(f"cannot listen on {endpoint}: {error}") from error
