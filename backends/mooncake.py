"""Objects in the pool of a Mooncake Store: memory that many machines contribute."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from lmcache.backends.mooncake_child import AT_ONCE, CHECKSUM, LANES, Call
from lmcache.core.backend import Capabilities, StorageBackend
from lmcache.core.errors import BackendClosed, BackendError, ConfigError
from lmcache.core.urls import parse_url
from lmcache.plugins import hookimpl
from lmcache.plugins.hookspecs import BackendSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lmcache.backends.mooncake_process import Lane, MooncakeProcess
    from lmcache.core.keys import ChunkKey
    from lmcache.core.urls import Url

PORT = 50051
PREFIX = "lmcache:"
TIMEOUT_S = 5
BUFFER = 1 << 30
"""Of which only what has been used takes memory, unless the protocol pins it."""
LEAST_BUFFER = 8 << 20
LEAST_SEGMENT = 16 << 20
HANDSHAKE = "P2PHANDSHAKE"
PROTOCOLS = ("tcp", "rdma")
METADATA_SCHEMES = ("http://", "https://", "etcd://", "redis://")
OPTIONS = ("buffer", "device", "metadata", "prefix", "protocol", "segment", "timeout")
CLOSED = "mooncake backend is closed"

_NO_ROOM = {-200, -1700}
"""In the pool, or in what we are allowed of it."""
_THERE_ALREADY = -705
_NOT_THERE = -704
_MISSES = {_NOT_THERE, -600, -703, -712}
"""Not there, larger than the room for it, not whole yet, not there any more."""
_ERRORS = {
    -101: "nobody holds that part of the pool",
    -703: "the object is not whole yet",
    -707: "the bytes took too long to come",
    -708: "the object is being copied",
    -714: "the object is in use",
    -800: "the bytes could not be moved",
    -900: "the master does not answer",
    -901: "the master does not answer in time",
}


class MooncakeBackend(StorageBackend):
    """Keeps each object in the pool, at `prefix` and the 64 hex digits of its key; see `Lane.fill`.

    How much there is room for is up to those who contribute memory to the pool. An object of more
    than an eighth of `buffer` is refused. The client is started when it is needed, so the master
    may come and go; no step of a call waits for it longer than `timeout_s`.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(persistent=True, shared=True)

    def __init__(
        self, host: str, port: int, *, buffer: int, timeout_s: float, **client: str | int
    ) -> None:
        """`client` is what `Settings` says: `metadata`, `protocol`, `segment` and so on."""
        from lmcache.backends.mooncake_process import why_it_cannot_be_imported

        if why := why_it_cannot_be_imported():
            raise ConfigError(
                f"Mooncake needs its library: pip install 'lmcache[mooncake]' ({why})"
            )
        self._server = host, port
        self._where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._buffer = buffer
        self._timeout_s = timeout_s
        self._client = client
        self._lock = threading.Lock()
        self._process: MooncakeProcess | None = None
        self._closed = False

    def put(self, key: ChunkKey, data: memoryview) -> bool:
        size = data.nbytes + CHECKSUM.size
        if not CHECKSUM.size < size <= self._buffer // LANES:
            return False
        with self._lane() as lane:
            lane.fill(data)
            code = lane.ask(Call.PUT, key, size)
        if code in _NO_ROOM:
            return False
        self._checked(0 if code == _THERE_ALREADY else code)
        return True

    def get_into(self, key: ChunkKey, out: memoryview) -> int | None:
        room = min(out.nbytes + CHECKSUM.size, self._buffer // LANES)
        with self._lane() as lane:
            size = lane.ask(Call.GET, key, room)
            if size >= 0 and not lane.empty_into(out, size):
                # the pool lends the memory of what is removed while somebody still reads it
                self._removed(lane, key)
                size = _NOT_THERE
        return None if size in _MISSES else self._checked(size) - CHECKSUM.size

    def contains(self, key: ChunkKey) -> bool:
        return self.count_leading([key]) == 1

    def count_leading(self, keys: Sequence[ChunkKey]) -> int:
        found = 0
        with self._lane() as lane:
            for start in range(0, len(keys), AT_ONCE):
                some = keys[start : start + AT_ONCE]
                here = self._checked(lane.ask(Call.COUNT, b"".join(some)))
                found += here
                if here < len(some):
                    break
        return found

    def remove(self, key: ChunkKey) -> bool:
        with self._lane() as lane:
            return self._removed(lane, key)

    def close(self) -> None:
        with self._lock:
            process, self._process, self._closed = self._process, None, True
        if process is not None:
            process.close()

    def _removed(self, lane: Lane, key: ChunkKey) -> bool:
        code = lane.ask(Call.REMOVE, key)
        return code != _NOT_THERE and self._checked(code) == 0

    def _checked(self, answer: int) -> int:
        if answer < 0:
            raise self._failed(f"{_ERRORS.get(answer, 'error')} ({answer})")
        return answer

    def _failed(self, why: object) -> BackendError:
        return BackendError(f"Mooncake at {self._where} failed us: {why}")

    @contextmanager
    def _lane(self) -> Iterator[Lane]:
        """A lane of the client's process, whose errors are ours."""
        process = None
        try:
            process = self._running()
            with process.lane() as lane:
                yield lane
        except OSError as error:
            is_late = isinstance(error, TimeoutError)
            if process is not None and not is_late:
                self._leave(process)
            if self._closed:
                raise BackendClosed(CLOSED) from error
            why = f"no answer within {self._timeout_s} s" if is_late else error
            raise self._failed(why) from error

    def _running(self) -> MooncakeProcess:
        """The process, when it is connected."""
        if not self._lock.acquire(timeout=self._timeout_s):
            raise TimeoutError
        try:
            if self._closed:
                raise BackendClosed(CLOSED)
            if self._process is None:
                self._process = self._start()
            try:
                self._process.wait()
            except ConnectionError:
                self._process.close(at_once=True)
                self._process = None
                raise
            return self._process
        finally:
            self._lock.release()

    def _start(self) -> MooncakeProcess:
        from lmcache.backends.mooncake_process import MooncakeProcess

        # who refuses is told apart at once, and the way to the master shows our own address
        with socket.create_connection(self._server, self._timeout_s) as sock:
            address = sock.getsockname()[0]
        return MooncakeProcess(
            self._buffer, self._timeout_s, master=self._where, address=address, **self._client
        )

    def _leave(self, process: MooncakeProcess) -> None:
        """It is of no more use: the next call starts another one."""
        with self._lock:
            if self._process is process:
                self._process = None
        process.close(at_once=True)


class ContributingBackend(MooncakeBackend):
    """One that is part of the pool itself: what of it lies with us goes with us."""

    capabilities: ClassVar[Capabilities] = Capabilities(shared=True)


def from_url(url: str) -> MooncakeBackend:
    """Open `mooncake://host:port?segment=20GB&protocol=rdma&device=mlx5_0` and the like."""
    parsed = parse_url(url, options=OPTIONS)
    if not parsed.host or parsed.port == 0 or parsed.path.strip("/") or parsed.username:
        raise ConfigError("write mooncake://host:port, where the master is")
    segment = _size(parsed, "segment", 0, LEAST_SEGMENT)
    return (ContributingBackend if segment else MooncakeBackend)(
        parsed.host,
        parsed.port or PORT,
        buffer=_size(parsed, "buffer", BUFFER, LEAST_BUFFER),
        timeout_s=parsed.count("timeout") or TIMEOUT_S,
        segment=segment,
        prefix=parsed.options.get("prefix", PREFIX),
        **_way(parsed),
    )


def _size(url: Url, option: str, default: int, least: int) -> int:
    size = url.size(option)
    if size is not None and size < least:
        raise ConfigError(f"option {option!r}: {least} bytes are the least")
    return default if size is None else size


def _way(url: Url) -> dict[str, str]:
    """How bytes travel, and how those between whom they do find each other."""
    protocol = url.options.get("protocol", "tcp")
    device = url.options.get("device", "")
    metadata = url.options.get("metadata", HANDSHAKE)
    if protocol not in PROTOCOLS:
        raise ConfigError(f"option 'protocol': {protocol!r} is none of {', '.join(PROTOCOLS)}")
    if device and protocol == "tcp":
        raise ConfigError("option 'device': it is for protocol=rdma")
    if metadata != HANDSHAKE and not metadata.startswith(METADATA_SCHEMES):
        raise ConfigError(
            f"option 'metadata': write {HANDSHAKE}, or the URL of a metadata server, "
            "such as http://host:8080/metadata"
        )
    return {"protocol": protocol, "device": device, "metadata": metadata}


@hookimpl
def lmcache_backends() -> Iterable[BackendSpec]:
    yield BackendSpec("mooncake", from_url, "the pool of a Mooncake Store, shared")
