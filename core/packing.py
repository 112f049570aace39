"""A backend whose objects are packed by a codec on the way in and unpacked on the way out."""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lmcache.core.backend import StorageBackend
from lmcache.core.errors import BackendError
from lmcache.core.objects import seal
from lmcache.core.payload import is_object

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lmcache.core.codec import Codec
    from lmcache.core.keys import ChunkKey

KEPT = 4
"""Buffers kept for the next reads: as many as a tier has threads that read."""


class Packed(StorageBackend):
    """`inner`, holding what `codec` makes of each object.

    An object that the codec finds damaged is returned with length 0, and `out` holds garbage. An
    object that a lossy codec has unpacked is sealed anew.
    """

    def __init__(self, inner: StorageBackend, codec: Codec) -> None:
        self._inner = inner
        self._codec = codec
        self._buffers = Buffers()
        self.capabilities = inner.capabilities  # type: ignore[misc]  # those of this instance

    def put(self, key: ChunkKey, data: memoryview) -> bool:
        return self._inner.put(key, memoryview(self._codec.encode(data)))

    def get_into(self, key: ChunkKey, out: memoryview) -> int | None:
        with self._buffers.take(self._codec.max_encoded_size(out.nbytes)) as packed:
            size = self._inner.get_into(key, packed)
            return None if size is None else self._unpack(packed[:size], out)

    def _unpack(self, packed: memoryview, out: memoryview) -> int | None:
        try:
            size = self._codec.decode_into(packed, out)
        except BackendError:
            return 0  # no object is that short: the caller takes it for the damage it is
        if size and not self._codec.lossless:
            unpacked = out.cast("B")[:size]
            if is_object(unpacked):
                seal(unpacked)
        return size

    def contains(self, key: ChunkKey) -> bool:
        return self._inner.contains(key)

    def remove(self, key: ChunkKey) -> bool:
        return self._inner.remove(key)

    def discard_damaged(self, key: ChunkKey) -> bool:
        return self._inner.discard_damaged(key)

    def count_leading(self, keys: Sequence[ChunkKey]) -> int:
        return self._inner.count_leading(keys)

    def close(self) -> None:
        self._inner.close()
        self._buffers.clear()


class Buffers:
    """Memory to read into, used again and again: new memory costs more than reading does.

    At most `KEPT` buffers outlast their use. Whoever takes one finds the bytes of the last use.
    """

    def __init__(self) -> None:
        self._free: deque[bytearray] = deque(maxlen=KEPT)

    @contextmanager
    def take(self, size: int) -> Iterator[memoryview]:
        """A buffer of `size` bytes that is nobody else's inside the `with` block."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = bytearray()
        if len(buffer) < size:
            buffer = bytearray(size)
        yield memoryview(buffer)[:size]
        self._free.append(buffer)

    def clear(self) -> None:
        """Let go of the memory that is not in use."""
        self._free.clear()
