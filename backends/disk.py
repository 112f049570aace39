"""Objects in large files of a directory."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, ClassVar

from lmcache.backends.budget import Budget
from lmcache.backends.catalog import Catalog, Place
from lmcache.backends.direct import BLOCK, padded, transfer_beside
from lmcache.backends.head import Head
from lmcache.backends.journal import NO_ROOM
from lmcache.backends.segments import Segments, path_of, touch
from lmcache.backends.shared_lock import SharedLock
from lmcache.core.backend import Capabilities, StorageBackend
from lmcache.core.errors import BackendError, ConfigError
from lmcache.core.log import init_logger
from lmcache.core.redact import redact_value
from lmcache.core.urls import parse_url
from lmcache.plugins import hookimpl
from lmcache.plugins.hookspecs import BackendSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from lmcache.backends.segments import Segment
    from lmcache.core.keys import ChunkKey

DEFAULT_MAX_SIZE = 10 * 10**9
DEFAULT_MIN_FREE = 10**9
MAX_SEGMENT = 256 << 20
MIN_SEGMENTS = 32
"""A full directory has at least so many, unless objects are larger than that."""

logger = init_logger(__name__)


class DiskBackend(StorageBackend):
    """Keeps at most `max_size` bytes of objects in a directory that other processes may use too.

    Objects lie one after another in segments, files of up to 256 MiB or a 32nd of `max_size`. Those
    whose objects were all used the longest ago make room. The bound holds at every instant, for all
    processes on the directory together, and `min_free` bytes of the file system stay free (if not
    given, 1 GB or 5 % of it, whichever is less): see `Budget`. A disk that is full, with nothing of
    ours that could make room, is a refusal and not an error.

    Bytes go past the page cache, unless `direct` is false or the file system cannot do that: the
    memory that they would take there is better given to the cache.

    An object is there once a record says so that follows its bytes, so it is whole or absent
    whenever a process is killed. Nothing is flushed to the device: after a power failure, or when
    somebody has cut a file that is being filled, an object may hold other bytes, which its checksum
    tells the tier. One that goes while it is read is a miss; only then may a miss have changed the
    buffer. What is discarded as damaged is not found again, and lies there until room is needed.
    Files are for their owner alone, and for processes of one machine. Not for use across a fork.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(persistent=True, shared=True)

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_size: int | None = None,
        min_free: int | None = None,
        direct: bool | None = None,
    ) -> None:
        self.directory = os.fspath(directory)
        self._failures = _Failures(self.directory)
        self._max_size = max_size = DEFAULT_MAX_SIZE if max_size is None else max_size
        with ExitStack() as opened, self._complaints():
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            disk = os.statvfs(self.directory)
            disk_bytes = disk.f_blocks * disk.f_frsize
            if min_free is None:
                min_free = min(DEFAULT_MIN_FREE, disk_bytes // 20)
            self._lock = opened.enter_context(closing(SharedLock(f"{self.directory}/lock")))
            self._transfer = transfer_beside(self._lock.path, direct=direct)
            self._segments = Segments(self.directory, self._transfer.flags)
            with self._lock:
                self._catalog = opened.enter_context(closing(Catalog(f"{self.directory}/journal")))
                self._budget = Budget(self._segments, self._catalog, max_size, min_free)
                self._budget.settle()
            size = min(MAX_SEGMENT, min(max_size, disk_bytes or max_size) // MIN_SEGMENTS)
            self._head = Head(self._claim, max(BLOCK, size // BLOCK * BLOCK))
            opened.pop_all()

    @property
    def is_direct(self) -> bool:
        """Whether bytes go past the page cache."""
        return self._transfer.direct

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Open `file:///dir?max_size=10GB&min_free=1GB&direct=false`."""
        parsed = parse_url(url, options=("max_size", "min_free", "direct"))
        if parsed.host or not parsed.path:
            raise ConfigError(
                f"{redact_value(url)!r} names no absolute directory; write file:///dir"
            )
        return cls(
            parsed.path,
            max_size=parsed.size("max_size"),
            min_free=parsed.size("min_free"),
            direct=parsed.flag("direct") if "direct" in parsed.options else None,
        )

    def put(self, key: ChunkKey, data: memoryview) -> bool:
        with self._failures:
            try:
                return self._store(key, data)
            except OSError as error:
                if error.errno in NO_ROOM:
                    return False
                raise

    def _store(self, key: ChunkKey, data: memoryview) -> bool:
        size = padded(data.nbytes)
        room = self._head.take(size) if size <= self._max_size else None
        if room is None:
            return False
        try:
            self._transfer.write(room.segment.fd, _flat(data), room.offset)
            self._catalog.store(key, Place(room.segment.number, room.offset, data.nbytes))
        except BaseException:
            self._head.leave(room.segment.number)  # nothing more may fit there
            raise
        finally:
            self._head.give_back(room)
        return True

    def get_into(self, key: ChunkKey, out: memoryview) -> int | None:
        with self._failures:
            place = self._catalog.find(key)
            while place and place.length <= out.nbytes:
                is_whole = self._read(place, _flat(out)[: place.length])
                before, place = place, self._catalog.find(key)
                if place != before:  # others may have written there meanwhile
                    continue
                if is_whole:
                    return place.length
                self._lose(key, place)
                return None
        return None

    def _read(self, place: Place, out: memoryview) -> bool:
        """Fill `out`; False if not all of it is there."""
        try:
            fd = self._segments.read(place.segment)
        except FileNotFoundError:
            return False
        try:
            touch(fd)
            return self._transfer.read(fd, out, place.offset)
        finally:
            os.close(fd)

    def _lose(self, key: ChunkKey, place: Place) -> None:
        """Know that somebody took a segment away, or the end of it."""
        self._head.leave(place.segment)
        with self._lock:
            if not os.path.exists(path_of(self.directory, place.segment)):
                self._catalog.drop(place.segment)
            elif self._catalog.find(key) == place:
                self._catalog.remove(key)

    def contains(self, key: ChunkKey) -> bool:
        return self.count_leading([key]) == 1

    def count_leading(self, keys: Sequence[ChunkKey]) -> int:
        with self._failures:
            return self._catalog.count_leading(keys)

    def remove(self, key: ChunkKey) -> bool:
        with self._failures, self._lock:
            return self._catalog.remove(key) is not None

    def discard_damaged(self, key: ChunkKey) -> bool:
        with self._failures, self._lock:
            place = self._catalog.remove(key)
        if place:
            path = path_of(self.directory, place.segment)
            logger.warning("damaged: %d bytes at %d of %s", place.length, place.offset, path)
        return place is not None

    def close(self) -> None:
        with self._failures, ExitStack() as closing_all:
            for each in (self._catalog, self._lock, self._head):
                closing_all.callback(each.close)

    def _claim(self, size: int) -> Segment | None:
        with self._lock:
            self._lock.check_there()
            return self._budget.claim(size)

    @contextmanager
    def _complaints(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"cannot keep objects in {self.directory!r}: {error}") from error


class _Failures:
    """`with failures:` makes those of the file system ours."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if isinstance(exc, OSError):
            reason = exc.strerror or exc
            raise BackendError(f"the files in {self._directory!r} failed us: {reason}") from exc


def _flat(view: memoryview) -> memoryview:
    """The bytes of a view of any shape."""
    return view.cast("B") if view.nbytes else memoryview(b"")


@hookimpl
def lmcache_backends() -> Iterable[BackendSpec]:
    yield BackendSpec("file", DiskBackend.from_url, "a directory, which processes may share")
