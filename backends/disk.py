"""One file per object under a directory, within a budget that all its users share.

    <dir>/ab/c/abc...64 hex digits.kv    an object: nothing but its bytes
    <dir>/ab/c/abc...digits.*.tmp        one being written; its writer holds an flock on it
    <dir>/usage                          the bytes charged by all processes; its flock is the lock
"""

from __future__ import annotations

import errno
import fcntl
import heapq
import os
import re
import secrets
import struct
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, ClassVar

from lmcache.core.backend import Capabilities, StorageBackend
from lmcache.core.errors import BackendClosed, BackendError, ConfigError
from lmcache.core.urls import parse_url, redact
from lmcache.plugins import hookimpl
from lmcache.plugins.hookspecs import BackendSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from typing_extensions import Self

    from lmcache.core.keys import ChunkKey

DEFAULT_MAX_SIZE = 10 * 10**9
DEFAULT_MIN_FREE = 10**9
_BLOCK = 4096
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_FALLOCATE = (errno.EINVAL, errno.EOPNOTSUPP)
_USED = struct.Struct("<q")
_VICTIMS = 16384
"""Eviction candidates kept from one scan: 4 MB of memory, and a scan's cost spread over as many."""
_STALE_S = 3600
_LOCK_TIMEOUT_S = 30
_NAMES = tuple(map(re.compile, ("[0-9a-f]{2}", "[0-9a-f]", r"[0-9a-f]{64}\.(kv|[0-9a-f]{16}\.tmp)")))
"""What directories and files of ours are called, level by level."""


class DiskBackend(StorageBackend):
    """Keeps at most `max_size` bytes of objects in a directory that other processes may use too.

    Bytes are charged before they are written. Under the directory's lock, the objects that were
    used the longest ago make room, and a temporary file is created with all its blocks; the data
    follows outside the lock. The sum charged is kept in the directory, not in a process, so that
    `max_size` bounds all processes together, at every instant, with what was there before. (Should
    they disagree about `max_size`, the largest holds.) A file is charged in blocks of 4 KiB;
    directories, and the files of others, are neither counted nor touched. A process that is killed,
    or a person who deletes files, leaves the sum too high, never too low, until the next open or
    scan for candidates counts again.

    `min_free` bytes of the file system stay free: objects make room if that helps, else the new one
    is refused. Recency is a file's modification time, so all processes share one order.

    Nothing is flushed to the device: after a power failure an object may hold other bytes, which
    its checksum tells the tier. A file that shrinks while it is read is a miss and is removed; only
    then may a miss have changed the buffer. Do not use a backend across a fork.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(persistent=True, shared=True)

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_size: int | None = None,
        min_free: int | None = None,
    ) -> None:
        self._root = os.fspath(directory)
        self._max_size = DEFAULT_MAX_SIZE if max_size is None else max_size
        self._victims: deque[tuple[int, str]] = deque()
        self._mutex = threading.Lock()
        self._lock_fd: int | None = None
        try:
            os.makedirs(self._root, mode=0o700, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._lock_fd = os.open(f"{self._root}/usage", flags, 0o600)
            total = os.statvfs(self._root)
            share = total.f_blocks * total.f_frsize // 20
            self._min_free = min(DEFAULT_MIN_FREE, share) if min_free is None else min_free
            with self._locked() as lock:
                self._recount(lock)
                self._make_room(lock, 0)
        except (OSError, BackendError) as error:
            self.close()
            raise ConfigError(f"cannot keep objects in {self._root!r}: {error}") from error

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Open `file:///dir?max_size=10GB&min_free=1GB`."""
        parsed = parse_url(url, options=("max_size", "min_free"))
        if parsed.host or not parsed.path:
            raise ConfigError(f"{redact(url)!r} names no absolute directory; write file:///dir")
        return cls(
            parsed.path, max_size=parsed.size("max_size"), min_free=parsed.size("min_free")
        )

    def put(self, key: ChunkKey, data: memoryview) -> bool:
        try:
            return self._store(self._path(key), data)
        except OSError as error:
            if error.errno in _NO_ROOM:
                return False
            raise self._failure(error) from error

    def get_into(self, key: ChunkKey, out: memoryview) -> int | None:
        try:
            with open(self._path(key), "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size > out.nbytes:
                    return None
                view = out.cast("B")[:size] if size else out[:0]
                while view and (n := file.readinto(view)):
                    view = view[n:]
                if not view:
                    _touch(file.fileno())
                    return size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failure(error) from error
        self.remove(key)
        return None

    def contains(self, key: ChunkKey) -> bool:
        try:
            os.stat(self._path(key))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._failure(error) from error
        return True

    def remove(self, key: ChunkKey) -> bool:
        path = self._path(key)
        try:
            with self._locked() as lock:
                return self._drop(lock, path) is not None
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        with self._mutex:
            if self._lock_fd is not None:
                os.close(self._lock_fd)
            self._lock_fd = None

    def _path(self, key: ChunkKey) -> str:
        if self._lock_fd is None:
            raise BackendClosed(f"disk backend at {self._root!r} is closed")
        name = key.hex()
        assert len(name) == 64
        return f"{self._root}/{name[:2]}/{name[2]}/{name}.kv"

    def _failure(self, error: OSError) -> BackendError:
        return BackendError(f"disk backend at {self._root!r}: {error.strerror or error}")

    def _store(self, path: str, data: memoryview) -> bool:
        temporary = f"{path.removesuffix('.kv')}.{secrets.token_hex(8)}.tmp"
        charge, charged, fd = _charge(data.nbytes), 0, -1
        try:
            with self._locked() as lock:
                if not self._make_room(lock, charge):
                    return False
                fd = _create(temporary)
                charged = self._add(lock, charge)
                _allocate(fd, data.nbytes)
            _write(fd, data)
            _touch(fd)
            with self._locked() as lock:
                previous = _size(path)
                os.replace(temporary, path)
                self._add(lock, -_charge(previous))
        except BaseException:
            if fd >= 0:
                # closed meanwhile: whoever opens the directory next finds it abandoned
                with suppress(BackendClosed), self._locked() as lock:
                    with suppress(FileNotFoundError):
                        os.unlink(temporary)
                        self._add(lock, -charged)
            raise
        finally:
            if fd >= 0:
                os.close(fd)
        return True

