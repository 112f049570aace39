"""Objects in a dict: the reference every other backend is compared with."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from lmcache.core.backend import StorageBackend
from lmcache.core.errors import BackendClosed
from lmcache.core.urls import parse_url
from lmcache.plugins import hookimpl
from lmcache.plugins.hookspecs import BackendSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Self

    from lmcache.core.keys import ChunkKey

DEFAULT_MAX_SIZE = 10**9


class MemoryBackend(StorageBackend):
    """Keeps at most `max_size` bytes of objects in this process; the oldest make room.

    An object larger than `max_size` is refused. Writing an object again makes it the newest.
    """

    def __init__(self, *, max_size: int | None = None) -> None:
        self._max_size = DEFAULT_MAX_SIZE if max_size is None else max_size
        self._size = 0
        self._objects: dict[ChunkKey, bytes] | None = {}
        self._lock = threading.Lock()

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Open `memory://?max_size=1GB`."""
        return cls(max_size=parse_url(url, options=("max_size",)).size("max_size"))

    def _held(self) -> dict[ChunkKey, bytes]:
        if self._objects is None:
            raise BackendClosed("memory backend is closed")
        return self._objects

    def _drop(self, key: ChunkKey) -> bool:
        data = self._held().pop(key, None)
        self._size -= len(data or b"")
        return data is not None

    def put(self, key: ChunkKey, data: memoryview) -> bool:
        with self._lock:
            objects = self._held()
            if data.nbytes > self._max_size:
                return False
            self._drop(key)
            while self._size + data.nbytes > self._max_size:
                self._drop(next(iter(objects)))
            objects[key] = bytes(data)
            self._size += data.nbytes
            return True

    def get_into(self, key: ChunkKey, out: memoryview) -> int | None:
        with self._lock:
            data = self._held().get(key)
        if data is None or len(data) > out.nbytes:
            return None
        if data:
            out.cast("B")[: len(data)] = data
        return len(data)

    def contains(self, key: ChunkKey) -> bool:
        with self._lock:
            return key in self._held()

    def remove(self, key: ChunkKey) -> bool:
        with self._lock:
            return self._drop(key)

    def close(self) -> None:
        with self._lock:
            self._objects = None


@hookimpl
def lmcache_backends() -> Iterable[BackendSpec]:
    yield BackendSpec("memory", MemoryBackend.from_url, "this process's memory, until it ends")
