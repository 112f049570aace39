"""The one interface a storage backend implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lmcache.core.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from typing_extensions import Self

    from lmcache.core.keys import ChunkKey


@dataclass(frozen=True)
class Capabilities:
    """What a backend promises beyond the required methods. The conformance suite checks each."""

    persistent: bool = False
    """Objects outlive the process that wrote them."""
    shared: bool = False
    """Another client that opens the same location sees the same objects."""
    removal: bool = True
    """`remove` is implemented."""


class StorageBackend(ABC):
    """Stores immutable objects under a `ChunkKey` (32 bytes, uniformly distributed).

    A backend is a cache tier: losing an object is legal, returning wrong bytes is not. Any method
    may be called from several threads at once. Views are C-contiguous, of any item and shape. A
    failure of the store raises `BackendError`, never the client library's own exception; a missing
    object is a value, not an error.
    """

    capabilities: ClassVar[Capabilities] = Capabilities()

    @abstractmethod
    def put(self, key: ChunkKey, data: memoryview) -> bool:
        """Store `data`; return False if the backend refuses it for lack of room.

        The object becomes visible whole or not at all. The caller may reuse the buffer on return.
        """

    @abstractmethod
    def get_into(self, key: ChunkKey, out: memoryview) -> int | None:
        """Fill the front of `out` with the object and return its length in bytes.

        Returns None, with `out` untouched, if the object is absent or larger than `out`.
        """

    @abstractmethod
    def contains(self, key: ChunkKey) -> bool:
        """Whether the object is present now. A later `get_into` may still miss."""

    @abstractmethod
    def close(self) -> None:
        """Release everything. A second time does nothing; other calls raise `BackendClosed`."""

    def remove(self, key: ChunkKey) -> bool:
        """Drop the object; return whether it was there."""
        raise Unsupported(f"{type(self).__name__} does not remove objects")

    def discard_damaged(self, key: ChunkKey) -> bool:
        """Drop the object, which is not what was put; return whether it was there.

        Override to keep it where people can look at it and no other method finds it.
        """
        return self.remove(key)

    def count_leading(self, keys: Sequence[ChunkKey]) -> int:
        """How many of `keys`, from the front, are present. Override to answer in one round trip."""
        for i, key in enumerate(keys):
            if not self.contains(key):
                return i
        return len(keys)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()
