"""Storage backends that misbehave on purpose, around one that does not.

tier = Tier(Flaky(MemoryBackend(), every=3))
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from lmcache.core.backend import StorageBackend
from lmcache.core.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.core.keys import ChunkKey


class Wrapper(StorageBackend):
    """Hands every call on to `backend`, after `before`. Closing it closes `backend`."""

    def __init__(self, backend: StorageBackend) -> None:
        self.backend = backend
        # the promises are those of the wrapped object, not of this class
        self.capabilities = backend.capabilities  # type: ignore[misc]

    def before(self) -> None:
        """Called at the start of every call but `close`; what it raises is what the call raises."""

    def put(self, key: ChunkKey, data: memoryview) -> bool:
        self.before()
        return self.backend.put(key, data)

    def get_into(self, key: ChunkKey, out: memoryview) -> int | None:
        self.before()
        return self.backend.get_into(key, out)

    def contains(self, key: ChunkKey) -> bool:
        self.before()
        return self.backend.contains(key)

    def remove(self, key: ChunkKey) -> bool:
        self.before()
        return self.backend.remove(key)

    def discard_damaged(self, key: ChunkKey) -> bool:
        self.before()
        return self.backend.discard_damaged(key)

    def count_leading(self, keys: Sequence[ChunkKey]) -> int:
        self.before()
        return self.backend.count_leading(keys)

    def close(self) -> None:
        self.backend.close()


class _Every:
    """True once in `n` calls, the n-th first, from whichever threads they come."""

    def __init__(self, n: int) -> None:
        if n < 1:
            raise ValueError(f"every={n} makes no sense; count from 1")
        self._n = n
        self._calls = 0
        self._lock = threading.Lock()

    def __call__(self) -> bool:
        with self._lock:
            self._calls += 1
            return self._calls % self._n == 0

    @property
    def times(self) -> int:
        return self._calls // self._n


class Flaky(Wrapper):
    """Every n-th call raises `BackendError` and does nothing else."""

    def __init__(self, backend: StorageBackend, *, every: int) -> None:
        super().__init__(backend)
        self._due = _Every(every)

    def before(self) -> None:
        if self._due():
            raise BackendError("a failure on purpose")

    @property
    def failures(self) -> int:
        """How many calls have failed."""
        return self._due.times


class Slow(Wrapper):
    """Every call takes `delay_s` longer."""

    def __init__(self, backend: StorageBackend, delay_s: float) -> None:
        super().__init__(backend)
        self.delay_s = delay_s

    def before(self) -> None:
        time.sleep(self.delay_s)


class Corrupting(Wrapper):
    """Every n-th hit has one bit flipped, in the middle of the object."""

    def __init__(self, backend: StorageBackend, *, every: int) -> None:
        super().__init__(backend)
        self._due = _Every(every)

    def get_into(self, key: ChunkKey, out: memoryview) -> int | None:
        size = super().get_into(key, out)
        if size and self._due():
            out.cast("B")[size // 2] ^= 1
        return size

    @property
    def corruptions(self) -> int:
        """How many objects were handed out damaged."""
        return self._due.times


__all__ = ["Corrupting", "Flaky", "Slow", "Wrapper"]
