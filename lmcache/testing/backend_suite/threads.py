"""Any method, any thread, any time: objects are whole or absent, whoever looks."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from lmcache.core.errors import BackendClosed, BackendError
from lmcache.testing.backend_suite.tools import at_once, got, payload

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.core.backend import StorageBackend
    from lmcache.core.keys import ChunkKey
    from lmcache.testing.backend_suite.tools import Keys, OpenClient

SIZE = 1 << 20
ROUNDS = 15


def plain(value: int) -> memoryview:
    """An object of one value, so that a mixture of two shows."""
    return memoryview(bytes([value]) * SIZE)


def is_whole(data: memoryview) -> bool:
    """Whether `data` is one of the `plain` objects."""
    return data == plain(data[0]) if data.nbytes else False


def watch_appearing(
    writer: StorageBackend, reader: StorageBackend, keys: Keys, *, times: int
) -> None:
    """What `writer` puts, each object so many `times`, `reader` sees whole as soon as it is put."""
    last = -1

    def write() -> None:
        nonlocal last
        try:
            for n in range(ROUNDS):
                for value in range(times * n, times * n + times):
                    assert writer.put(keys(n), plain(value)) is True
                    last = n
        finally:
            last = ROUNDS

    def read() -> None:
        while (n := last) < ROUNDS:
            coming = got(reader, keys(n + 1), SIZE)
            assert coming is None or is_whole(coming), "an object was seen before it was whole"
            if n >= 0:
                there = got(reader, keys(n), SIZE)
                assert there is not None, "an object was put and is not seen"
                assert is_whole(there), "an object was put and is not whole"
        # or a writer that is done before we have looked would prove nothing
        assert got(reader, keys(ROUNDS - 1), SIZE) is not None, "an object was put and is not seen"

    at_once(write, read)


class ThreadRules:
    """Rules of calls that are made at once."""

    def test_threads_do_not_get_in_each_others_way(
        self, backend: StorageBackend, keys: Keys
    ) -> None:
        threads, each = 8, 25
        names = [keys(n) for n in range(threads * each)]

        def work(mine: list[ChunkKey]) -> None:
            objects = [payload(1000 + n) for n in range(each)]
            for name, data in zip(mine, objects, strict=True):
                assert backend.put(name, data) is True
                assert got(backend, name, 2000) == data
            for name, data in zip(mine, objects, strict=True):
                assert got(backend, name, 2000) == data

        at_once(*(lambda t=t: work(names[t::threads]) for t in range(threads)))

    def test_putting_again_shows_neither_a_mixture_nor_a_gap(
        self, backend: StorageBackend, keys: Keys
    ) -> None:
        writers = threading.Semaphore(0)
        backend.put(keys(), plain(0))

        def write(*values: int) -> None:
            try:
                for value in values * ROUNDS:
                    backend.put(keys(), plain(value))
            finally:
                writers.release()

        def read() -> None:
            while not writers.acquire(blocking=False):
                data = got(backend, keys(), SIZE)
                assert data is not None, "an object vanished while it was put again"
                assert is_whole(data), "an object mixed two writes"

        at_once(read, read, lambda: write(1, 2), lambda: write(3, 4))

    def test_an_object_appears_whole(self, backend: StorageBackend, keys: Keys) -> None:
        watch_appearing(backend, backend, keys, times=1)

    def test_an_object_appears_whole_to_others_if_shared(
        self, backend: StorageBackend, open_client: OpenClient, keys: Keys
    ) -> None:
        if backend.capabilities.shared:
            with open_client() as other:
                watch_appearing(backend, other, keys, times=2)

    def test_an_object_vanishes_whole(self, backend: StorageBackend, keys: Keys) -> None:
        if not backend.capabilities.removal:
            return
        done = threading.Event()
        backend.put(keys(), plain(0))

        def write() -> None:
            try:
                for value in range(2 * ROUNDS):
                    backend.put(keys(), plain(value))
                    backend.remove(keys())
            finally:
                done.set()

        def read() -> None:
            while not done.is_set():
                data = got(backend, keys(), SIZE)
                assert data is None or is_whole(data), "an object was read while it was removed"

        at_once(read, read, write)

    def test_closing_ends_the_calls_of_others(self, open_client: OpenClient, keys: Keys) -> None:
        """With an answer or an error of ours, and the next one finds it closed."""
        backend, data, closed = open_client(), payload(64), threading.Event()
        backend.put(keys(), data)

        def read() -> None:
            assert got(backend, keys(), 64) in (data, None)

        calls: list[Callable[[], object]] = [
            read,
            lambda: backend.put(keys(), data),
            lambda: backend.contains(keys()),
            lambda: backend.count_leading([keys()]),
        ]

        def work(call: Callable[[], object]) -> None:
            last = False
            while not last:
                last = closed.is_set()
                try:
                    call()
                except BackendClosed:
                    return
                except BackendError:
                    continue
            raise AssertionError("it is closed and does not say so")

        def close() -> None:
            time.sleep(0.05)
            try:
                backend.close()
            finally:
                closed.set()

        at_once(close, *(lambda c=c: work(c) for c in calls * 2))
