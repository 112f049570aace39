"""How an object's bytes are packed for a storage tier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar


class Codec(ABC):
    """Packs and unpacks the bytes of one object. Any thread may call it at any time."""

    name: str
    """The name users choose it by."""
    lossless: ClassVar[bool] = True
    """Whether every object comes back as it was, to the last bit.

    A codec that is not may change the numbers in an object's payload, and nothing else: the header
    comes back as it was, and so do bytes that are no object. What it unpacks gets a new checksum,
    so nobody but the codec can tell damage from what it has changed itself.
    """

    @abstractmethod
    def encode(self, data: memoryview) -> bytes:
        """Pack `data`, and leave it as it is."""

    @abstractmethod
    def decode_into(self, packed: memoryview, out: memoryview) -> int | None:
        """Unpack into the front of `out` and return the length in bytes.

        Returns None, with `out` untouched, if the object is larger than `out`. Raises
        `BackendError` if `packed` is damaged in any way; the front of `out` may hold garbage then.
        Takes little memory beyond `out`, whatever `packed` says.
        """

    @abstractmethod
    def max_encoded_size(self, size: int) -> int:
        """The largest `encode` can return for `size` bytes of input."""
