from __future__ import annotations

import pytest

from lmcache.backends.memory import MemoryBackend, lmcache_backends
from lmcache.core.errors import ConfigError
from lmcache.testing import BackendSuite


def key(n: int) -> bytes:
    return bytes([n]) * 32


class TestMemory(BackendSuite):
    @pytest.fixture
    def open_backend(self):
        return MemoryBackend


@pytest.fixture
def small():
    with MemoryBackend.from_url("memory://?max_size=1kB") as backend:
        yield backend


def put(backend: MemoryBackend, n: int, size: int) -> bool:
    return backend.put(key(n), memoryview(bytes([n]) * size))


def present(backend: MemoryBackend) -> list[int]:
    return [n for n in range(256) if backend.contains(key(n))]


def test_the_oldest_make_room(small):
    for n in range(1, 5):
        assert put(small, n, 300)
    assert present(small) == [2, 3, 4]
    assert put(small, 5, 700)
    assert present(small) == [4, 5]


def test_writing_again_makes_new(small):
    for n in (1, 2, 3, 1, 4):
        assert put(small, n, 300)
    assert present(small) == [1, 3, 4]


def test_the_limit_is_exact(small):
    assert put(small, 1, 1000)
    assert not put(small, 2, 1001)
    assert present(small) == [1]


def test_what_is_removed_or_replaced_makes_room(small):
    put(small, 1, 900)
    put(small, 1, 400)
    assert put(small, 2, 600)
    assert present(small) == [1, 2]
    small.remove(key(1))
    assert put(small, 3, 400)
    assert present(small) == [2, 3]


def test_an_empty_object_is_an_object(small):
    assert put(small, 1, 0)
    assert small.get_into(key(1), memoryview(bytearray(4))) == 0
    assert small.get_into(key(1), memoryview(bytearray())) == 0


def test_a_misspelt_option_is_refused():
    with pytest.raises(ConfigError, match="'maxsize' in a 'memory' URL; did you mean 'max_size'"):
        MemoryBackend.from_url("memory://?maxsize=1GB")


def test_it_is_offered():
    (spec,) = lmcache_backends()
    assert spec.scheme == "memory"
    assert isinstance(spec.open("memory://"), MemoryBackend)
