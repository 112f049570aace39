"""What the rules of storage backends have in common."""

from __future__ import annotations

import hashlib
import os
import threading
from typing import TYPE_CHECKING

from lmcache.core.keys import ChunkKey
from lmcache.testing.backend_suite.watch import Hung

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.core.backend import StorageBackend

    OpenClient = Callable[[], StorageBackend]

POISON = 0xA5
LARGEST = 5 << 20
"""What every backend stores."""
_RANDOM = (1 << 20) - 3


class Keys:
    """Keys no other run uses, so that the suite is safe on a location in use."""

    def __init__(self) -> None:
        self._salt = os.urandom(32)
        self.made: set[ChunkKey] = set()

    def __call__(self, n: int = 0) -> ChunkKey:
        return self._note(hashlib.sha256(self._salt + n.to_bytes(8, "big")).digest())

    def flipped(self, bit: int) -> ChunkKey:
        """The first key with one bit changed."""
        number = int.from_bytes(self(), "big") ^ (1 << bit)
        return self._note(number.to_bytes(32, "big"))

    def ending(self, tail: bytes) -> ChunkKey:
        """A key that ends with `tail`, and begins like all that this makes."""
        return self._note(self()[: 32 - len(tail)] + tail)

    def unused(self) -> ChunkKey:
        """A key that nobody has had before."""
        return self._note(os.urandom(32))

    def _note(self, digest: bytes) -> ChunkKey:
        key = ChunkKey(digest)
        self.made.add(key)
        return key


def payload(size: int) -> memoryview:
    """Bytes that no other object has, in a buffer that may be written."""
    # random bytes are slow to make; repeated at an odd distance, no two pages are alike
    some = os.urandom(min(size, _RANDOM))
    return memoryview(bytearray(some * (size // _RANDOM + 1)))[:size]


def blank(size: int) -> memoryview:
    """A buffer whose bytes betray a backend that did not fill all of it, or filled too much."""
    return memoryview(bytearray([POISON]) * size)


def got(backend: StorageBackend, key: ChunkKey, size: int) -> memoryview | None:
    """What the backend returns for `key`, with room for `size` bytes."""
    out = blank(size)
    length = backend.get_into(key, out)
    return None if length is None else out[:length]


def at_once(*targets: Callable[[], None]) -> None:
    """Run `targets` in a thread each; pass on a failure, if there is one."""
    failures: list[BaseException] = []

    def run(target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as failure:  # noqa: BLE001
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(t,), daemon=True) for t in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        # of what hangs, other failures are mostly a consequence
        raise min(failures, key=lambda failure: not isinstance(failure, Hung))
