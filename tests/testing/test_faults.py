from __future__ import annotations

import threading
import time

import pytest

from lmcache.backends.disk import DiskBackend
from lmcache.backends.memory import MemoryBackend
from lmcache.core.errors import BackendClosed, BackendError
from lmcache.testing import BackendSuite
from lmcache.testing.faults import Corrupting, Flaky, Slow, Wrapper

NEVER = 10**9


def key(n: int) -> bytes:
    return bytes([n]) * 32


def put(backend, n: int = 1) -> bool:
    return backend.put(key(n), memoryview(bytes([n]) * 64))


def got(backend, n: int = 1) -> bytes | None:
    out = memoryview(bytearray(64))
    return None if backend.get_into(key(n), out) is None else bytes(out)


WRAPPERS = {
    "Wrapper": Wrapper,
    "Flaky": lambda backend: Flaky(backend, every=NEVER),
    "Slow": lambda backend: Slow(backend, 0),
    "Corrupting": lambda backend: Corrupting(backend, every=NEVER),
}


class TestWrappersKeepTheContract(BackendSuite):
    @pytest.fixture(params=WRAPPERS)
    def open_backend(self, request, tmp_path):
        return lambda: WRAPPERS[request.param](DiskBackend(tmp_path))


def test_the_promises_are_those_of_the_wrapped(tmp_path):
    disk, memory = DiskBackend(tmp_path), MemoryBackend()
    assert Flaky(disk, every=2).capabilities == disk.capabilities
    assert Flaky(memory, every=2).capabilities == memory.capabilities
    assert disk.capabilities != memory.capabilities
    disk.close()


def test_flaky_fails_every_nth_call_whatever_it_is():
    backend = Flaky(MemoryBackend(), every=3)
    assert put(backend)
    assert got(backend) == bytes([1]) * 64
    calls = (
        lambda: put(backend, 2),
        lambda: got(backend),
        lambda: backend.contains(key(1)),
        lambda: backend.remove(key(1)),
        lambda: backend.discard_damaged(key(1)),
        lambda: backend.count_leading([key(1)]),
    )
    for call in calls:
        with pytest.raises(BackendError, match="on purpose"):
            call()
        assert backend.contains(key(1)), "what failed did nothing"
        assert not backend.contains(key(2))
    assert backend.failures == 6


def test_flaky_counts_over_all_threads():
    backend, caught = Flaky(MemoryBackend(), every=5), []

    def work() -> None:
        for _ in range(250):
            try:
                backend.contains(key(1))
            except BackendError as error:
                caught.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(caught) == backend.failures == 200


def test_slow_takes_its_time():
    backend = Slow(MemoryBackend(), 0.02)
    start = time.monotonic()
    assert put(backend)
    assert got(backend) is not None
    assert time.monotonic() - start >= 0.04


def test_corrupting_flips_one_bit_of_every_nth_hit():
    backend = Corrupting(MemoryBackend(), every=2)
    put(backend)
    whole = bytes([1]) * 64
    assert got(backend) == whole
    assert got(backend, 2) is None, "a miss does not count"
    damaged = got(backend)
    flipped = int.from_bytes(damaged, "big") ^ int.from_bytes(whole, "big")
    assert flipped.bit_count() == 1
    assert got(backend) == whole, "what is stored is unharmed"
    assert backend.corruptions == 1


def test_a_fault_of_ones_own():
    class Refusing(Wrapper):
        def put(self, key, data):
            return False

    backend = Refusing(MemoryBackend())
    assert not put(backend)


def test_closing_closes_the_wrapped():
    inner = MemoryBackend()
    Slow(inner, 0).close()
    with pytest.raises(BackendClosed):
        put(inner)


@pytest.mark.parametrize("kind", [Flaky, Corrupting])
def test_never_is_not_a_period(kind):
    with pytest.raises(ValueError, match="every=0"):
        kind(MemoryBackend(), every=0)
