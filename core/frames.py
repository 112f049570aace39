"""Messages over a Unix socket: a length, MessagePack, and file descriptors beside them."""

from __future__ import annotations

import array
import os
import socket
import struct
from typing import TYPE_CHECKING, TypeVar

import msgspec

from lmcache.core.errors import HandoverError

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_MESSAGE = 8 << 20
MAX_DESCRIPTORS = 250
"""Linux takes 253 in one message."""

_LENGTH = struct.Struct("<I")

Message = TypeVar("Message")


def send(sock: socket.socket, message: object, fds: Sequence[int] = ()) -> None:
    """Send a message whole. Raises `OSError`; then nothing more can be sent."""
    body = msgspec.msgpack.encode(message)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    frame = _LENGTH.pack(len(body)) + body
    sent = sock.sendmsg([frame], rights)
    if sent < len(frame):  # or an empty send would fail where the answer says why
        sock.sendall(frame[sent:])


def receive(
    sock: socket.socket, decoder: msgspec.msgpack.Decoder[Message], *, descriptors: int = 0
) -> tuple[Message, list[int]]:
    """A message and the descriptors beside it, at most so many; the caller owns them.

    Raises `HandoverError` for what is no such message, and for the connection's end; and `OSError`.
    """
    name = getattr(decoder.type, "__name__", "order")
    received = array.array("i")
    space = socket.CMSG_SPACE(received.itemsize * max(descriptors, 1))
    flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
    head, ancillary, _, _ = sock.recvmsg(_LENGTH.size, space, flags)
    for level, what, data in ancillary:
        if level == socket.SOL_SOCKET and what == socket.SCM_RIGHTS:
            received.frombytes(data[: len(data) - len(data) % received.itemsize])
    try:
        if len(received) > descriptors:
            raise HandoverError(f"{len(received)} file descriptors where {descriptors} may be")
        (length,) = _LENGTH.unpack(head)
        if length > MAX_MESSAGE:
            raise HandoverError(f"a {name} of {length} bytes is over {MAX_MESSAGE}")
        body = bytearray()
        while len(body) < length and (part := sock.recv(length - len(body))):
            body += part
        return decoder.decode(body), list(received)
    except BaseException as error:
        for fd in received:
            os.close(fd)
        if isinstance(error, (struct.error, msgspec.MsgspecError, HandoverError)):
            raise HandoverError(f"no valid {name} from the other process: {error}") from error
        raise
