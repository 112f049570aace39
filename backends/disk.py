"""Objects as files, one each, in a directory."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, ClassVar

from lmcache.backends.budget import Budget
from lmcache.backends.direct import transfer_beside
from lmcache.backends.tree import touch
from lmcache.core.backend import Capabilities, StorageBackend
from lmcache.core.errors import BackendError, ConfigError
from lmcache.core.redact import redact_value
from lmcache.core.urls import parse_url
from lmcache.plugins import hookimpl
from lmcache.plugins.hookspecs import BackendSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from typing_extensions import Self

    from lmcache.core.keys import ChunkKey

DEFAULT_MAX_SIZE = 10 * 10**9
DEFAULT_MIN_FREE = 10**9
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class DiskBackend(StorageBackend):
    """Keeps at most `max_size` bytes of objects in a directory that other processes may use too.

    The bound holds at every instant, for all processes on the directory together: see `Budget`. The
    least recently used objects make room. `min_free` bytes of the file system stay free (if not
    given, 1 GB or 5 % of it, whichever is less). A full disk is a refusal, not an error.

    Bytes go past the page cache, unless `direct` is false or the file system cannot do that: the
    memory that they would take there is better given to the cache.

    An object appears by a rename, so it is whole or absent whenever a process is killed. Nothing is
    flushed to the device: after a power failure an object may hold other bytes, which its checksum
    tells the tier. A file that is found shorter than it said is a miss and is removed; only then
    may a miss have changed the buffer. What is discarded as damaged is set aside: see `Budget`.
    Files are for their owner alone. Not for use across a fork.
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
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            if min_free is None:
                disk = os.statvfs(self.directory)
                min_free = min(DEFAULT_MIN_FREE, disk.f_blocks * disk.f_frsize // 20)
            if max_size is None:
                max_size = DEFAULT_MAX_SIZE
            self._budget = Budget(self.directory, max_size, min_free)
            try:
                self._transfer = transfer_beside(self._budget.ledger_path, direct=direct)
            except BaseException:
                self._budget.close()
                raise
        except OSError as error:
            raise ConfigError(f"cannot keep objects in {self.directory!r}: {error}") from error

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
        with self._failures():
            try:
                return self._store(key.hex(), data)
            except OSError as error:
                if error.errno in _NO_ROOM:
                    return False
                raise

    def _store(self, name: str, data: memoryview) -> bool:
        reservation = self._budget.reserve(name, data.nbytes, self._transfer.flags)
        if reservation is None:
            return False
        try:
            self._transfer.write(reservation.fd, _flat(data))
            touch(reservation.fd)
            self._budget.commit(reservation)
        except BaseException:
            self._budget.cancel(reservation)
            raise
        finally:
            os.close(reservation.fd)
        return True

    def get_into(self, key: ChunkKey, out: memoryview) -> int | None:
        path = self._budget.path(key.hex())
        with self._failures(), suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | self._transfer.flags)
            try:
                found = os.fstat(fd)
                if found.st_size > out.nbytes:
                    return None
                if self._transfer.read(fd, _flat(out)[: found.st_size]):
                    touch(fd, found.st_mtime_ns)
                    return found.st_size
            finally:
                os.close(fd)
            self._budget.remove(key.hex())
        return None

    def contains(self, key: ChunkKey) -> bool:
        path = self._budget.path(key.hex())
        with self._failures(), suppress(FileNotFoundError):
            os.stat(path)
            return True
        return False

    def remove(self, key: ChunkKey) -> bool:
        with self._failures():
            return self._budget.remove(key.hex())

    def discard_damaged(self, key: ChunkKey) -> bool:
        with self._failures():
            return self._budget.set_aside(key.hex())

    def close(self) -> None:
        self._budget.close()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise BackendError(f"the files in {self.directory!r} failed us: {reason}") from error


def _flat(view: memoryview) -> memoryview:
    """The bytes of a view of any shape."""
    return view.cast("B") if view.nbytes else memoryview(b"")


@hookimpl
def lmcache_backends() -> Iterable[BackendSpec]:
    yield BackendSpec("file", DiskBackend.from_url, "a directory, which processes may share")
