"""Host copies move every byte once, however many threads share the work."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import rig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache.core.kernels import host
from lmcache.core.kernels.host import HostCopier


@pytest.fixture(params=[1, 2, 3, 8], ids="{}threads".format)
def copier(request):
    made = HostCopier(request.param)
    yield made
    made.close()


@pytest.fixture
def always_parallel(monkeypatch):
    monkeypatch.setattr(host, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(host, "PIECE_BYTES", 300)


def scattered(lengths, seed=0):
    """Source and destination buffers, and runs between them in different orders, with gaps."""
    rng = np.random.default_rng(seed)
    lengths = np.array(lengths, np.int64)
    size = int(lengths.sum()) + 3 * len(lengths) + 1
    source = rng.integers(0, 256, size, np.uint8)
    target = np.full(size, rig.POISON, np.uint8)

    def starts():
        order = rng.permutation(len(lengths))
        places = np.empty(len(lengths), np.int64)
        places[order] = np.concatenate(([0], np.cumsum(lengths[order] + 3)[:-1]))
        return places

    return source, target, starts(), starts(), lengths


def check(copier, lengths):
    source, target, origin, to, lengths = scattered(lengths)
    expected, untouched = target.copy(), source.copy()
    for a, b, n in zip(to, origin, lengths, strict=True):
        expected[a : a + n] = source[b : b + n]
    copier.copy(to + target.ctypes.data, origin + source.ctypes.data, lengths)
    assert (target == expected).all()
    assert (source == untouched).all()


@pytest.mark.parametrize(
    "lengths",
    [[1], [1, 63, 1000], [7] * 100, [1, 1, 1, 100_000], [100_000, 1, 1, 1], [4096] * 7],
    ids=["one byte", "odd", "many", "big at the end", "big at the start", "even"],
)
def test_every_byte_arrives(copier, always_parallel, lengths):
    check(copier, lengths)


def test_every_byte_of_a_large_copy_arrives(copier):
    """As large as it takes to be shared among threads."""
    check(copier, [host.PARALLEL_BYTES // 50 + i for i in range(100)])


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_every_byte_of_a_long_run_arrives(copier, extra):
    check(copier, [17, 3 * host.PIECE_BYTES + extra, host.PIECE_BYTES + extra, 5])


def test_one_long_run_is_shared_among_threads(monkeypatch):
    copier, sizes, move = HostCopier(2), [], host._memmove
    local, both = threading.local(), threading.Barrier(2)

    def note(to, origin, size):
        if not hasattr(local, "has_met"):
            local.has_met = both.wait(10)
        sizes.append(size)
        move(to, origin, size)

    monkeypatch.setattr(host, "_memmove", note)
    check(copier, [8 * host.PIECE_BYTES])
    copier.close()
    assert sizes == [host.PIECE_BYTES] * 8


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=40))
def test_any_lengths(copier, always_parallel, lengths):
    check(copier, lengths)


def test_nothing_to_copy(copier, always_parallel):
    none = np.empty(0, np.int64)
    copier.copy(none, none, none)


def test_source_and_destination_may_overlap():
    data = np.arange(100, dtype=np.uint8)
    copier = HostCopier(1)
    at = np.array([data.ctypes.data], np.int64)
    copier.copy(at + 10, at, np.array([80], np.int64))
    copier.close()
    assert (data[10:90] == np.arange(80)).all()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_threads_use_other_cores_than_the_one_that_asks(always_parallel):
    """Engines pin their main thread after the copier is made, and its threads come later."""
    cores = os.sched_getaffinity(0)
    copier = HostCopier(2)
    try:
        os.sched_setaffinity(0, {min(cores)})
        check(copier, [1000] * 10)
        [thread] = [t for t in threading.enumerate() if t.name.startswith("lmcache-copy")]
        assert os.sched_getaffinity(thread.native_id) == cores
        check(copier, [1000] * 10)
        assert os.sched_getaffinity(thread.native_id) == cores - {min(cores)}
    finally:
        os.sched_setaffinity(0, cores)
        copier.close()


def test_no_thread_is_left():
    copier = HostCopier(4)
    check(copier, [host.PARALLEL_BYTES // 8] * 16)
    copier.close()
    copier.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("lmcache-copy")]


def test_other_threads_run_during_a_copy():
    """One `memmove` of 64 MiB takes milliseconds; with the interpreter lock held, all of them."""
    source, target = np.ones(64 << 20, np.uint8), np.zeros(64 << 20, np.uint8)
    copier, stop, ticks = HostCopier(1), threading.Event(), []
    begun = threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(target[-1])
            begun.set()

    thread = threading.Thread(target=tick)
    thread.start()
    begun.wait()
    one = np.array([1 << 26], np.int64)
    seen_before = False
    for _ in range(20):
        before = len(ticks)
        copier.copy(np.array([target.ctypes.data]), np.array([source.ctypes.data]), one)
        seen_before |= len(ticks) > before + 100
        if seen_before:
            break
    stop.set()
    thread.join()
    copier.close()
    assert seen_before
