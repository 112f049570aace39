"""How the processes of one engine come to share a slab.

Each mover listens on a Unix socket whose name follows from the engine's id; it can do so before
the decider exists. The decider connects, reads a `Hello` from every mover, reserves a slab that
fits their pages, and answers each with a `Grant` and the slab's file descriptor. The connection
stays open for as long as both live: its end is how each learns of the other's death. A decider
that leaves half-closes it, and the mover closes it when it has let go of the slab: so its end
always means that the mover touches the slab no more.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import msgspec

from lmcache.core.errors import HandoverError
from lmcache.core.frames import MAX_DESCRIPTORS, receive, send
from lmcache.core.layout import PageLayout, fingerprint_of
from lmcache.core.log import init_logger

if TYPE_CHECKING:
    from collections.abc import Callable

logger = init_logger(__name__)

PROTOCOL = 1
BUSY_S = 0.1
CHANNELS = 2
"""Sockets on which a mover that lends its memory asks for copies: for loads and for stores."""


class Lending(msgspec.Struct, frozen=True, kw_only=True):
    """The mover's pages, for the decider's process to copy.

    Of a host's memory the descriptors come with `Hello`; of a GPU's the handles are in here.
    """

    layout: PageLayout
    spans: list[tuple[int, int]]
    """Address and length of each mapping, where the layout's addresses count."""
    handles: list[bytes] = []
    """Of a GPU's memory: one for each of the spans."""
    device: bytes = b""
    """The identity of that GPU."""
    guard: int = 0
    """The address of the word that every kernel has to pass which writes to the pages."""


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """A mover introduces itself."""

    protocol: int = PROTOCOL
    number: int
    """Its number among the engine's movers, from 0."""
    page_tokens: int
    page_bytes: int
    """Bytes stored for the tokens of one page, over all cache groups."""
    summary: str
    """Of its layout."""
    slice_index: int
    """The slice of every page it holds; movers with the same slice hold the same bytes."""
    pid: int
    lends: Lending | None = None
    """Set if the decider's process is to copy; then no slab is handed over."""

    @property
    def fingerprint(self) -> str:
        """Of its layout."""
        return fingerprint_of(self.summary)


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """The decider's answer; the slab's file descriptor is beside it unless the mover lends."""

    attachment: int
    """What a step must name to be meant for this slab and no earlier or later one."""
    slab_bytes: int
    word: int
    """The mover's number among all that map this slab."""
    pages_per_chunk: int
    slices: tuple[int, ...]
    layout: bytes
    writes: bool
    """Whether this mover is the one that stores its slice."""


_HELLO = msgspec.msgpack.Decoder(Hello)
_GRANT = msgspec.msgpack.Decoder(Grant)


def address_of(engine_id: str, number: int) -> str:
    """The socket address of one mover: abstract on Linux, so that no crash leaves a file."""
    name = hashlib.blake2b(f"{engine_id}/{number}".encode(), digest_size=16).hexdigest()
    if sys.platform == "linux":
        return f"\0lmcache-{os.getuid()}-{name}"
    return os.path.join(tempfile.gettempdir(), f"lmcache-{os.getuid()}-{name[:16]}.sock")


def _is_dead(sock: socket.socket) -> bool:
    """Whether nobody reads what we would send: who leaves still waits for us to let go."""
    try:
        sock.send(b"\0")
    except OSError:
        return True
    return False


def _same_user(sock: socket.socket) -> bool:
    return _peer(sock)[1] == os.getuid()


def _peer(sock: socket.socket) -> tuple[int, int]:
    """Process, 0 for one that cannot be seen from here, and user at the other end."""
    if not hasattr(socket, "SO_PEERCRED"):
        return 0, os.getuid()  # the socket file's mode guards it
    packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", packed)
    return pid, uid


class Door:
    """A mover's side: waits for a decider, for as long as the process lives."""

    GRANT_S = 60.0
    """How long a decider may take from `Hello` to `Grant`: it visits others and opens its tiers."""

    def __init__(
        self,
        address: str,
        hello: Hello,
        granted: Callable[[Grant, list[int]], None],
        left: Callable[[], None],
        lend: Callable[[int], tuple[Lending, list[int]]] | None = None,
    ) -> None:
        """`granted(grant, fds)` owns `fds` from then on: the slab's, or the channels of a lending.

        `left()` returns when nothing uses the slab. Both are called on the door's thread; `left`
        also if nothing was granted. `lend(process)` is asked at each visit, and says what is lent
        to this visitor and with which descriptors.
        """
        self._hello = hello
        self._lend = lend
        self._granted = granted
        self._left = left
        self._address = address
        self._visitor: socket.socket | None = None
        self._closed = False
        self.has_lost = False
        """Whether the last decider is gone without waiting for us to let go of its slab."""
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            if not address.startswith("\0") and os.path.exists(address):
                os.unlink(address)
            self._listener.bind(address)
            if not address.startswith("\0"):
                os.chmod(address, 0o600)
        except OSError as error:
            self._listener.close()
            raise HandoverError(f"cannot listen for the decider: {error}") from error
        self._listener.listen(2)
        self._thread = threading.Thread(target=self._serve, name="lmcache-door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and let go of the decider."""
        self._closed = True
        for sock in (self._listener, self._visitor):
            with suppress(OSError):
                if sock:  # closing alone would not wake the thread that waits for it
                    sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(self.GRANT_S)
        if not self._address.startswith("\0") and os.path.exists(self._address):
            os.unlink(self._address)

    def hang_up(self) -> None:
        """Let go of the decider at hand; another, or the same, may come. Any thread may call it."""
        with suppress(OSError):
            if self._visitor:
                self._visitor.shutdown(socket.SHUT_RD)

    def _serve(self) -> None:
        while not self._closed:
            try:
                self._visitor, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(BUSY_S)  # e.g. no descriptor left
                continue
            with self._visitor as sock:
                if _same_user(sock) and not self._closed:
                    self._meet(sock)

    def _meet(self, sock: socket.socket) -> None:
        try:
            sock.settimeout(self.GRANT_S)
            with ExitStack() as unused:
                channels = self._introduce(sock, unused)
                grant, fds = receive(sock, _GRANT, descriptors=1)
                if len(fds) != (0 if channels else 1):
                    raise HandoverError(f"{len(fds)} file descriptors with the grant")
                self._take(grant, fds or [channel.detach() for channel in channels])
            sock.sendall(b"\1")
            sock.settimeout(None)
            sock.recv(1)  # returns when the decider is gone or leaves
        except (OSError, HandoverError) as error:
            # the decider sees the closed connection
            logger.debug("no slab from the decider: %s", error)
        finally:
            self.has_lost = _is_dead(sock)
            self._left()

    def _introduce(self, sock: socket.socket, unused: ExitStack) -> list[socket.socket]:
        """Say hello; our ends of the channels, if we lend, which `unused` closes."""
        if self._lend is None:
            send(sock, self._hello)
            return []
        lends, fds = self._lend(_peer(sock)[0])
        hello = msgspec.structs.replace(self._hello, lends=lends)
        pairs = [socket.socketpair() for _ in range(CHANNELS)]
        with ExitStack() as theirs:
            for _, end in pairs:
                theirs.enter_context(end)
            send(sock, hello, [*(end.fileno() for _, end in pairs), *fds])
        return [unused.enter_context(end) for end, _ in pairs]

    def _take(self, grant: Grant, fds: list[int]) -> None:
        try:
            self._granted(grant, fds)
        except Exception as error:
            logger.warning("cannot use the slab: %r", error)
            raise HandoverError(f"cannot use the slab: {error!r}") from error


class Visit:
    """The decider's side of one connection."""

    def __init__(self, address: str, timeout_s: float) -> None:
        """Raises `HandoverError` if no mover listens there or none answers in time."""
        self.fds: list[int] = []
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(timeout_s)
        try:
            self._sock.connect(address)
            if not _same_user(self._sock):
                raise HandoverError("the mover belongs to another user")
            self.hello, self.fds = receive(self._sock, _HELLO, descriptors=MAX_DESCRIPTORS)
            self._check()
        except OSError as error:
            self.close()
            raise HandoverError(f"no mover answers: {error}") from error
        except HandoverError:
            self.close()
            raise

    def _check(self) -> None:
        lends = self.hello.lends
        wanted = CHANNELS + (0 if lends.handles else len(lends.spans)) if lends else 0
        if self.hello.protocol != PROTOCOL:
            problem = f"mover speaks handover protocol {self.hello.protocol}, we speak {PROTOCOL}"
        elif len(self.fds) != wanted:
            problem = f"{len(self.fds)} file descriptors instead of {wanted}"
        else:
            return
        raise HandoverError(problem)

    def take_fds(self) -> list[int]:
        """The descriptors that came with `hello`; the caller owns them."""
        fds, self.fds = self.fds, []
        return fds

    def grant(self, grant: Grant, fd: int | None) -> None:
        """Hand over the slab; returns when the mover has mapped it. None for one that lends."""
        try:
            send(self._sock, grant, [] if fd is None else [fd])
            if self._sock.recv(1) != b"\1":
                raise HandoverError("the mover could not map the slab; its log says why")
        except OSError as error:
            raise HandoverError(f"the mover did not take the slab: {error}") from error

    def leave(self) -> None:
        """Have the mover let go of the slab; `is_alive` says when it has. Never blocks."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def is_alive(self) -> bool:
        """Whether the mover may still touch the slab, and we hold our end. Never blocks."""
        try:
            self._sock.setblocking(False)
            return self._sock.recv(1) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """End the connection."""
        self._sock.close()
        for fd in self.take_fds():
            os.close(fd)
