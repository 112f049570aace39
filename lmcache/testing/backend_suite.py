"""The contract of `StorageBackend`, as tests anyone can run."""

from __future__ import annotations

import hashlib
import inspect
import os
import threading
from typing import TYPE_CHECKING

import pytest

from lmcache.core.errors import BackendClosed, Unsupported
from lmcache.core.keys import ChunkKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lmcache.core.backend import StorageBackend

    OpenBackend = Callable[[], StorageBackend]

POISON = 0xA5
SIZES = (1, 4096, 3 * 4096 + 7, 5 << 20)
PATIENCE_S = 120


class Keys:
    """Keys no other run uses, so that the suite is safe on a location in use."""

    def __init__(self) -> None:
        self._salt = os.urandom(32)
        self.made: set[ChunkKey] = set()

    def __call__(self, n: int = 0) -> ChunkKey:
        return self._note(hashlib.sha256(self._salt + n.to_bytes(8, "big")).digest())

    def flipped(self, bit: int) -> ChunkKey:
        """The first key with one bit changed."""
        number = int.from_bytes(self(), "big") ^ (1 << bit)
        return self._note(number.to_bytes(32, "big"))

    def _note(self, digest: bytes) -> ChunkKey:
        key = ChunkKey(digest)
        self.made.add(key)
        return key


def payload(size: int) -> memoryview:
    """Bytes that no other object has, in a buffer that may be written."""
    return memoryview(bytearray(os.urandom(size)))


def blank(size: int) -> memoryview:
    """A buffer whose bytes betray a backend that did not fill all of it, or filled too much."""
    return memoryview(bytearray([POISON]) * size)


def got(backend: StorageBackend, key: ChunkKey, size: int) -> memoryview | None:
    """What the backend returns for `key`, with room for `size` bytes."""
    out = blank(size)
    length = backend.get_into(key, out)
    return None if length is None else out[:length]


def at_once(*targets: Callable[[], None]) -> None:
    """Run `targets` in a thread each; pass on the first of their failures."""
    failures: list[BaseException] = []

    def run(target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as failure:  # noqa: BLE001
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(t,), daemon=True) for t in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), f"a thread still runs after {PATIENCE_S} s"
    if failures:
        raise failures[0]


class BackendSuite:
    """Subclass, provide `open_backend`, and every rule below is checked.

    Needs room for some 20 MB. What it stored it removes again where the backend can.
    """

    @pytest.fixture
    def open_backend(self) -> OpenBackend:
        """Opens the same location each time it is called."""
        raise NotImplementedError("override the open_backend fixture")

    @pytest.fixture
    def keys(self, open_backend: OpenBackend) -> Iterator[Keys]:
        keys = Keys()
        yield keys
        with open_backend() as backend:
            promises = backend.capabilities
            if promises.removal and (promises.persistent or promises.shared):
                for key in keys.made:
                    backend.remove(key)

    @pytest.fixture
    def backend(self, open_backend: OpenBackend, keys: Keys) -> Iterator[StorageBackend]:
        with open_backend() as backend:
            yield backend

    def test_the_suite_is_whole(self) -> None:
        """A rule may be marked xfail with a reason; it may not be replaced."""
        for name, rule in inspect.getmembers(BackendSuite, inspect.isfunction):
            mine = getattr(type(self), name)
            if not name.startswith("test_") or mine is rule:
                continue
            marks = getattr(mine, "pytestmark", [])
            assert any(m.name == "xfail" and m.kwargs.get("reason") for m in marks), (
                f"{name} is replaced; mark it xfail(reason=...) instead"
            )

    @pytest.mark.parametrize("size", SIZES)
    def test_what_is_put_is_got(self, backend: StorageBackend, keys: Keys, size: int) -> None:
        data, out = payload(size), blank(size)
        assert backend.put(keys(), data) is True
        assert backend.get_into(keys(), out) == size
        assert out == data

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

    def test_putting_again_changes_nothing(self, backend: StorageBackend, keys: Keys) -> None:
        data = payload(5000)
        for _ in range(3):
            assert backend.put(keys(), data) is True
            assert got(backend, keys(), 5000) == data

    def test_putting_again_shows_neither_a_mixture_nor_a_gap(
        self, backend: StorageBackend, keys: Keys
    ) -> None:
        size, rounds = 1 << 20, 15
        writers = threading.Semaphore(0)
        backend.put(keys(), memoryview(bytes(size)))

        def write(*values: int) -> None:
            try:
                for value in values * rounds:
                    backend.put(keys(), memoryview(bytes([value]) * size))
            finally:
                writers.release()

        def read() -> None:
            while not writers.acquire(blocking=False):
                data = got(backend, keys(), size)
                assert data is not None, "an object vanished while it was put again"
                assert bytes(data) == bytes(data[:1]) * size, "an object mixed two writes"

        at_once(read, read, lambda: write(1, 2), lambda: write(3, 4))

    def test_keys_that_differ_in_one_bit_do_not_meet(
        self, backend: StorageBackend, keys: Keys
    ) -> None:
        names = [keys(), *map(keys.flipped, range(256))]
        objects = [payload(32) for _ in names]
        for name, data in zip(names, objects, strict=True):
            backend.put(name, data)
        for name, data in zip(names, objects, strict=True):
            assert got(backend, name, 32) == data

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

    def test_remove_if_promised(self, backend: StorageBackend, keys: Keys) -> None:
        backend.put(keys(), payload(8))
        if not backend.capabilities.removal:
            with pytest.raises(Unsupported):
                backend.remove(keys())
            return
        assert backend.remove(keys()) is True
        assert got(backend, keys(), 8) is None
        assert backend.remove(keys()) is False

    def test_objects_outlive_their_writer_if_promised(
        self, open_backend: OpenBackend, keys: Keys
    ) -> None:
        data = payload(8)
        with open_backend() as first:
            first.put(keys(), data)
        with open_backend() as second:
            want = data if second.capabilities.persistent else None
            assert got(second, keys(), 8) == want

    def test_two_at_once_share_if_promised(self, open_backend: OpenBackend, keys: Keys) -> None:
        data = payload(8)
        with open_backend() as one, open_backend() as two:
            one.put(keys(), data)
            want = data if two.capabilities.shared else None
            assert got(two, keys(), 8) == want

    @pytest.mark.parametrize(
        "call",
        [
            pytest.param(lambda b, key: b.put(key, payload(8)), id="put"),
            pytest.param(lambda b, key: b.get_into(key, blank(8)), id="get_into"),
            pytest.param(lambda b, key: b.contains(key), id="contains"),
            pytest.param(lambda b, key: b.count_leading([key]), id="count_leading"),
            pytest.param(lambda b, key: b.remove(key), id="remove"),
        ],
    )
    def test_closed_means_closed(
        self,
        open_backend: OpenBackend,
        keys: Keys,
        call: Callable[[StorageBackend, ChunkKey], object],
        request: pytest.FixtureRequest,
    ) -> None:
        backend = open_backend()
        backend.put(keys(), payload(8))
        backend.close()
        # a backend that never removes may say so first
        unsupported = request.node.callspec.id == "remove" and not backend.capabilities.removal
        with pytest.raises((BackendClosed, Unsupported) if unsupported else BackendClosed):
            call(backend, keys())

    def test_closing_twice_is_harmless(self, open_backend: OpenBackend) -> None:
        backend = open_backend()
        backend.close()
        backend.close()

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
