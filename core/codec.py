"""How an object's bytes are packed for a storage tier."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Codec(ABC):
    """Packs and unpacks the bytes of one object: lossless, and safe to call from any thread."""

    name: str
    """The name users choose it by."""

    @abstractmethod
    def encode(self, data: memoryview) -> bytes:
        """Pack `data`."""

    @abstractmethod
    def decode_into(self, packed: memoryview, out: memoryview) -> int:
        """Unpack into the front of `out` and return the length; raise `BackendError` if damaged."""

    @abstractmethod
    def max_encoded_size(self, size: int) -> int:
        """The largest `encode` can return for `size` bytes of input."""
