"""A backend whose objects are packed by a codec on the way in and unpacked on the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache.core.backend import StorageBackend
from lmcache.core.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.core.codec import Codec
    from lmcache.core.keys import ChunkKey


class Packed(StorageBackend):
    """`inner`, holding what `codec` makes of each object.

    An object that the codec finds damaged is returned with length 0, and `out` holds garbage.
    """

    def __init__(self, inner: StorageBackend, codec: Codec) -> None:
        self._inner = inner
        self._codec = codec
        self.capabilities = inner.capabilities  # type: ignore[misc]  # those of this instance

    def put(self, key: ChunkKey, data: memoryview) -> bool:
        return self._inner.put(key, memoryview(self._codec.encode(data)))

    def get_into(self, key: ChunkKey, out: memoryview) -> int | None:
        packed = memoryview(bytearray(self._codec.max_encoded_size(out.nbytes)))
        size = self._inner.get_into(key, packed)
        if size is None:
            return None
        try:
            return self._codec.decode_into(packed[:size], out)
        except BackendError:
            return 0  # no object is that short: the caller takes it for the damage it is

    def contains(self, key: ChunkKey) -> bool:
        return self._inner.contains(key)

    def remove(self, key: ChunkKey) -> bool:
        return self._inner.remove(key)

    def count_leading(self, keys: Sequence[ChunkKey]) -> int:
        return self._inner.count_leading(keys)

    def close(self) -> None:
        self._inner.close()
