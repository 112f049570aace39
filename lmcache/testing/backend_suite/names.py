"""Keys are opaque, no two of them meet, and what is said to be there is there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from lmcache.core.errors import Unsupported
from lmcache.core.keys import ChunkKey
from lmcache.testing.backend_suite.tools import got, payload

if TYPE_CHECKING:
    from lmcache.core.backend import StorageBackend
    from lmcache.testing.backend_suite.tools import Keys

MANY = 3000
ENDINGS = (
    bytes(8),
    bytes(7) + b"\2",
    b"\xff" * 8,
    b"/../../x",
    b"abcdefgh",
    b"ABCDEFGH",
    b"        ",
    b"       \0",
    b"\r\n\r\n\r\n\r\n",
    b"%00%00%0",
    b"'\"\\*?[]%",
)
"""What names, patterns and texts are cut, folded or unfolded at."""


class NameRules:
    """Rules of keys, `contains`, `count_leading` and `remove`."""

    def test_keys_that_differ_in_one_bit_do_not_meet(
        self, backend: StorageBackend, keys: Keys
    ) -> None:
        names = [keys(), *map(keys.flipped, range(256))]
        objects = [payload(32) for _ in names]
        for name, data in zip(names, objects, strict=True):
            backend.put(name, data)
        for name, data in zip(names, objects, strict=True):
            assert got(backend, name, 32) == data

    def test_any_bytes_make_a_key(self, backend: StorageBackend, keys: Keys) -> None:
        names = [keys.ending(tail) for tail in ENDINGS]
        for n, name in enumerate(names):
            assert got(backend, name, 32) is None
            backend.put(name, memoryview(bytes([n]) * 32))
        for n, name in enumerate(names):
            assert got(backend, name, 32) == memoryview(bytes([n]) * 32)

    def test_contains_what_was_put_and_nothing_else(
        self, backend: StorageBackend, keys: Keys
    ) -> None:
        assert backend.contains(keys()) is False
        backend.put(keys(), payload(8))
        assert backend.contains(keys()) is True
        assert backend.contains(keys(1)) is False

    def test_count_leading_stops_at_the_first_gap(
        self, backend: StorageBackend, keys: Keys
    ) -> None:
        names = [keys(n) for n in range(4)]
        for n in (0, 1, 3):
            backend.put(names[n], payload(8))
        assert backend.count_leading(names) == 2
        assert backend.count_leading(names[:2]) == 2
        assert backend.count_leading(names[2:]) == 0

    def test_count_leading_of_no_keys_is_zero(self, backend: StorageBackend) -> None:
        assert backend.count_leading([]) == 0

    def test_count_leading_takes_many_keys(self, backend: StorageBackend, keys: Keys) -> None:
        """A prompt of a million tokens has some thousands."""
        backend.put(keys(), payload(8))
        nobodys = [ChunkKey(os.urandom(32)) for _ in range(MANY)]
        assert backend.count_leading([keys(), *nobodys]) == 1

    def test_remove_if_promised(self, backend: StorageBackend, keys: Keys) -> None:
        backend.put(keys(), payload(8))
        if not backend.capabilities.removal:
            with pytest.raises(Unsupported):
                backend.remove(keys())
            return
        assert backend.remove(keys()) is True
        assert got(backend, keys(), 8) is None
        assert backend.remove(keys()) is False

    def test_what_was_damaged_is_gone(self, backend: StorageBackend, keys: Keys) -> None:
        if not backend.capabilities.removal:
            return
        other = payload(8)
        backend.put(keys(1), other)
        for _ in range(2):
            backend.put(keys(), payload(8))
            assert backend.discard_damaged(keys()) is True
            assert got(backend, keys(), 8) is None
            assert backend.discard_damaged(keys()) is False
            assert got(backend, keys(1), 8) == other

    def test_removing_one_leaves_the_others(self, backend: StorageBackend, keys: Keys) -> None:
        if not backend.capabilities.removal:
            return
        names = [keys.ending(b"%8d" % n) for n in range(0, 20, 2)]
        for name in names:
            backend.put(name, memoryview(name))
        for n, name in enumerate(names):
            assert all(got(backend, left, 32) == memoryview(left) for left in names[n:])
            assert backend.remove(name) is True
