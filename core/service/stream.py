"""Messages over a stream socket, each behind its length: nothing here ever waits but `wait`."""

from __future__ import annotations

import select
import socket
import struct
from urllib.parse import urlsplit

from lmcache.core.errors import ServiceError
from lmcache.core.service.wire import MAX_MESSAGE

READ_BYTES = 1 << 17
"""What is read at once, unless a message is known to be larger."""
FAITH = 16
"""How many times what has been read of a message there may be room for."""
KEPT_BYTES = 1 << 20
"""A buffer up to this size is kept for the next message."""
MAX_BEHIND = 2 * MAX_MESSAGE
"""Bytes that the other side may be behind by before it is taken for lost."""

_LENGTH = struct.Struct("<I")


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of `tcp://host:port`. Raises `ServiceError` for anything else."""
    try:
        url = urlsplit(endpoint)
        host, port = url.hostname, url.port
    except ValueError:
        host = port = None
    if not host or port is None or url.scheme != "tcp" or url.path or url.query or url.username:
        raise ServiceError(f"{endpoint} is no address of the form tcp://host:port")
    return host, port


def connect(endpoint: str, timeout_s: float) -> Stream:
    """A stream to who listens there. Raises `ServiceError` if nobody does."""
    address = parse_endpoint(endpoint)
    try:
        return Stream(socket.create_connection(address, timeout_s))
    except (OSError, UnicodeError) as error:
        raise ServiceError(f"no server listens on {endpoint}: {error}") from error


class Stream:
    """One end of a connection. Not for several threads at once."""

    def __init__(self, sock: socket.socket) -> None:
        """Takes the connected socket over."""
        self._sock = sock
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unsent = bytearray()
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._start = self._stop = 0
        """What has been read and not been taken."""

    def fileno(self) -> int:
        """For selectors."""
        return self._sock.fileno()

    @property
    def is_behind(self) -> bool:
        """Whether the other side has not taken all that was sent to it."""
        return bool(self._unsent)

    def send(self, message: bytes) -> None:
        """Send as much as the other side takes now; the rest is for `flush`.

        Raises `ServiceError` if the other side has left, or is too far behind.
        """
        head, sent = _LENGTH.pack(len(message)), 0
        try:
            if not self._unsent:
                sent = self._sock.sendmsg([head, message])
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise ServiceError(f"cannot send: {error}") from error
        if len(self._unsent) + len(message) > MAX_BEHIND:
            raise ServiceError(f"more than {MAX_BEHIND} bytes wait to be taken")
        if sent < len(head) + len(message):
            self._unsent += (head + message)[sent:]

    def flush(self) -> None:
        """Send more of what the other side has not taken. Raises `ServiceError` if it has left."""
        try:
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError as error:
            raise ServiceError(f"cannot send: {error}") from error

    def read(self) -> bool:
        """Read once, when all has been taken that can be; whether there was anything.

        Raises `ServiceError` if the other side has left.
        """
        self._make_room()
        try:
            size = self._sock.recv_into(self._buffer[self._stop :])
        except BlockingIOError:
            return False
        except OSError as error:
            raise ServiceError(f"cannot receive: {error}") from error
        if not size:
            raise ServiceError("the other side has left")
        self._stop += size
        return True

    def take(self) -> memoryview | None:
        """The next message that has been read whole; what it lies in is used again by `read`.

        Raises `ServiceError` if it is to be larger than any may be.
        """
        length = self._next_length()
        start = self._start + _LENGTH.size
        if length is None or self._stop - start < length:
            return None
        self._start = start + length
        return self._buffer[start : self._start]

    def wait(self, timeout_s: float) -> None:
        """Wait until there is something to read, or to `flush`."""
        news = select.poll()
        news.register(self._sock, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        news.poll(max(1, int(timeout_s * 1e3)))

    def close(self) -> None:
        """Disconnect. What was sent and taken still arrives."""
        self._sock.close()

    # ----

    def _next_length(self) -> int | None:
        if self._stop - self._start < _LENGTH.size:
            return None
        length: int = _LENGTH.unpack_from(self._buffer, self._start)[0]
        if length > MAX_MESSAGE:
            raise ServiceError(f"a message of {length} bytes is over {MAX_MESSAGE}")
        return length

    def _make_room(self) -> None:
        """For the message of which the beginning has been read, or for any."""
        rest = self._buffer[self._start : self._stop]
        announced = _LENGTH.size + (self._next_length() or 0)
        need = max(READ_BYTES, min(announced, FAITH * len(rest)))
        if need > len(self._buffer) or (not rest and len(self._buffer) > KEPT_BYTES):
            self._buffer = memoryview(bytearray(need))
        self._buffer[: len(rest)] = rest
        self._start, self._stop = 0, len(rest)
