"""What is put is got, whole, whatever its size and however it lies in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lmcache.testing.backend_suite.tools import LARGEST, blank, got, payload

if TYPE_CHECKING:
    from lmcache.core.backend import StorageBackend
    from lmcache.testing.backend_suite.tools import Keys

SIZES = (1, 4096, 3 * 4096 + 7, LARGEST)
LARGE = (32 << 20) + 13


class ObjectRules:
    """Rules of `put` and `get_into`."""

    @pytest.mark.parametrize("size", SIZES)
    def test_what_is_put_is_got(self, backend: StorageBackend, keys: Keys, size: int) -> None:
        data, out = payload(size), blank(size)
        assert backend.put(keys(), data) is True
        assert backend.get_into(keys(), out) == size
        assert out == data

    def test_an_empty_object_is_an_object_or_refused(
        self, backend: StorageBackend, keys: Keys
    ) -> None:
        out = blank(8)
        stored = backend.put(keys(), memoryview(b""))
        assert stored in (True, False)
        assert backend.get_into(keys(), out) == (0 if stored else None)
        assert out == blank(8)

    def test_a_large_object_is_stored_or_leaves_what_was_there(
        self, backend: StorageBackend, keys: Keys
    ) -> None:
        small, large = payload(1000), payload(LARGE)
        backend.put(keys(), small)
        stored = backend.put(keys(1), large)
        assert stored in (True, False)
        assert got(backend, keys(1), LARGE) == (large if stored else None)
        backend.put(keys(), large)  # a backend may as well keep what it has under a key
        assert got(backend, keys(), LARGE) in ((large, small) if stored else (small,))

    def test_a_miss_leaves_the_buffer_alone(self, backend: StorageBackend, keys: Keys) -> None:
        out = blank(64)
        assert backend.get_into(keys(), out) is None
        assert out == blank(64)

    def test_an_object_larger_than_the_buffer_is_a_miss(
        self, backend: StorageBackend, keys: Keys
    ) -> None:
        backend.put(keys(), payload(5000))
        out = blank(4999)
        assert backend.get_into(keys(), out) is None
        assert out == blank(4999)

    def test_a_larger_buffer_is_filled_at_its_front_only(
        self, backend: StorageBackend, keys: Keys
    ) -> None:
        data, out = payload(5000), blank(9000)
        backend.put(keys(), data)
        assert backend.get_into(keys(), out) == 5000
        assert out[:5000] == data
        assert out[5000:] == blank(4000)

    def test_put_copies(self, backend: StorageBackend, keys: Keys) -> None:
        data = payload(64)
        want = memoryview(bytes(data))
        backend.put(keys(), data)
        data[:] = bytes(64)
        assert got(backend, keys(), 64) == want

    def test_a_view_of_any_format_is_its_bytes(self, backend: StorageBackend, keys: Keys) -> None:
        data, out = payload(64), blank(64)
        views = (data.toreadonly(), data.cast("I"), data.cast("B", [2, 4, 8]).toreadonly())
        for n, view in enumerate(views):
            assert backend.put(keys(n), view) is True
            assert got(backend, keys(n), 64) == data
        assert backend.get_into(keys(0), out.cast("H")) == 64
        assert out == data

    def test_a_view_of_a_part_is_that_part(self, backend: StorageBackend, keys: Keys) -> None:
        data, out = payload(103), blank(103)
        assert backend.put(keys(), data[3:67]) is True
        assert backend.get_into(keys(), out[7:71]) == 64
        assert out[7:71] == data[3:67]
        assert out[:7] == blank(7)
        assert out[71:] == blank(32)

    def test_putting_again_changes_nothing(self, backend: StorageBackend, keys: Keys) -> None:
        data = payload(5000)
        for _ in range(3):
            assert backend.put(keys(), data) is True
            assert got(backend, keys(), 5000) == data

    def test_an_object_of_another_length_leaves_nothing_of_the_old_one(
        self, backend: StorageBackend, keys: Keys
    ) -> None:
        """Whichever of the two is kept: a key never has two objects in fact."""
        for n, (first, second) in enumerate([(7000, 3000), (3000, 7000)]):
            old, new = payload(first), payload(second)
            backend.put(keys(n), old)
            backend.put(keys(n), new)
            assert got(backend, keys(n), 7000) in (old, new)
