"""Whatever happens to a directory, in whatever order: whole objects or none, and within bounds."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from disk_rig import (
    MB,
    charged,
    charged_now,
    free_bytes,
    got,
    key,
    mounted,
    pattern,
    present,
    put,
    python,
    segments,
    size_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lmcache.backends.direct import BLOCK, padded
from lmcache.backends.disk import MIN_SEGMENTS, DiskBackend

CAPS = st.sampled_from([0, 8192, 50_000, 200_000, 2_000_000])
NUMBERS = st.integers(0, 15)
SIZES = st.integers(0, 60_000)
MODES = st.sampled_from([None, False])


class Directory(RuleBasedStateMachine):
    """Two backends on one directory, people who meddle with its files, and restarts."""

    @initialize(cap=CAPS, direct=MODES)
    def begin(self, cap, direct):
        self.root = Path(tempfile.mkdtemp())
        self.sizes: dict[int, set[int]] = {}
        self.cap = cap
        self.backends = [self._opened(direct), self._opened(False)]

    def _opened(self, direct):
        return DiskBackend(self.root, max_size=self.cap, min_free=0, direct=direct)

    @rule(which=st.integers(0, 1), n=NUMBERS, size=SIZES)
    def put(self, which, n, size):
        stored = put(self.backends[which], n, size)
        # the segment that the other fills stays
        foreign = max(BLOCK, self.cap // MIN_SEGMENTS)
        assert stored or padded(size) > self.cap - foreign
        assert not stored or padded(size) <= self.cap
        if stored:
            self.sizes.setdefault(n, set()).add(size)

    @rule(which=st.integers(0, 1), n=NUMBERS)
    def get(self, which, n):
        data = got(self.backends[which], n, 60_000)
        if data is not None:
            assert data == pattern(n, len(data))
            assert len(data) in self.sizes[n]

    @rule(which=st.integers(0, 1), n=NUMBERS)
    def remove(self, which, n):
        was_there = self.backends[1 - which].contains(key(n))
        assert self.backends[which].remove(key(n)) is was_there
        assert not self.backends[1 - which].contains(key(n))

    @rule(n=st.integers(0, 20), length=st.integers(0, 60_000))
    def somebody_cuts_a_segment(self, n, length):
        for path in segments(self.root)[n : n + 1]:
            os.truncate(path, min(length, size_of(path)))

    @rule(n=st.integers(0, 20))
    def somebody_deletes_a_segment(self, n):
        for path in segments(self.root)[n : n + 1]:
            path.unlink()

    @rule(at=st.integers(0, 4000), bit=st.integers(0, 7))
    def a_bit_of_the_journal_flips(self, at, bit):
        path = self.root / "journal"
        if at < size_of(path):
            data = bytearray(path.read_bytes())
            data[at] ^= 1 << bit
            with path.open("r+b") as file:
                file.write(data)

    @rule(cap=CAPS, direct=MODES)
    def restart(self, cap, direct):
        self._close()
        self.cap = cap
        self.backends = [self._opened(direct), self._opened(direct)]

    @rule(left=st.integers(0, 4000))
    def restart_without_all_of_the_journal(self, left):
        self._close()
        os.truncate(self.root / "journal", min(left, size_of(self.root / "journal")))
        self.backends = [self._opened(None), self._opened(None)]

    @invariant()
    def it_is_within_bounds(self):
        assert charged(self.root) <= self.cap

    def _close(self):
        for backend in self.backends:
            backend.close()

    def teardown(self):
        if hasattr(self, "backends"):
            self._close()
            shutil.rmtree(self.root)


TestDirectory = Directory.TestCase
TestDirectory.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), largest=st.integers(3000, 70_000), direct=MODES)
def test_filled_a_hundred_times_over(tmp_path_factory, seed, largest, direct):
    root, cap = tmp_path_factory.mktemp("cache"), 300_000
    draw, written, n = random.Random(seed), 0, 0
    with DiskBackend(root, max_size=cap, min_free=0, direct=direct) as backend:
        while written < 100 * cap and n < 4000:
            size = draw.randint(largest // 2, largest)
            assert put(backend, n, size)
            assert got(backend, n) == pattern(n, size)
            if n % 100 == 0:
                assert charged(root) <= cap
            written, n = written + size, n + 1
        kept = present(backend, range(n))
        # the newest, as many as there is room for
        assert kept == [*range(n - len(kept), n)]
        assert sum(padded(len(got(backend, n))) for n in kept) > 0.6 * cap


@contextmanager
def real_disk(where: Path, kind: str):
    """A small file system that becomes full."""
    if kind == "tmpfs":
        with mounted(where, "size=8m") as root:
            yield root
        return
    image = where.with_suffix(".img")
    image.write_bytes(b"")
    os.truncate(image, 16 << 20)
    where.mkdir()
    for command in (["mkfs.ext4", "-q", "-F", image], ["mount", "-o", "loop", image, where]):
        if (
            not shutil.which(command[0])
            or subprocess.run(command, capture_output=True, check=False).returncode
        ):
            pytest.skip("may not mount an ext4 here")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


@pytest.mark.parametrize("direct", [None, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_disk_that_is_really_full(tmp_path, kind, direct):
    """The limit is beyond it, and others write there: refusals, and whole objects or none."""
    with real_disk(tmp_path / "disk", kind) as root:
        with DiskBackend(root, max_size=1000 * MB, min_free=0, direct=direct) as backend:
            answers = [put(backend, n, 150_000 + n) for n in range(300)]
            assert answers.count(True) > 30
            (root / "other").write_bytes(bytes(max(0, free_bytes(root) - 20_000)))
            answers += [put(backend, n, 150_000 + n) for n in range(300, 330)]
            kept = present(backend, range(330))
            assert len(kept) > 5
            for n in kept:
                assert answers[n]
                assert got(backend, n) == pattern(n, 150_000 + n)
            assert charged(root) >= sum(padded(150_000 + n) for n in kept)


KILLED = """
import itertools, os, signal, tempfile
from lmcache.backends import catalog
from lmcache.backends.direct import padded
NAMES = "open pwrite pwritev write posix_fallocate ftruncate utime".split()
NAMES += "rename replace unlink close".split()

def bomb(calls):
    count = itertools.count()
    def wrap(real):
        def call(*args, **options):
            if next(count) == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)
        return call
    for name in NAMES:
        setattr(os, name, wrap(getattr(os, name)))

def opened():
    return DiskBackend(root, max_size=CAP, min_free=0)

def attempt(calls):
    bomb(calls)
    backend = opened()
    for n in (1, 3, 4, 5, 6):
        put(backend, n, 8000 + n)
    backend.remove(key(4))
    put(backend, 7, 40_000)
    backend.close()
    os._exit(0)

CAP = 20 * 4096
catalog._SLACK = 3
survived = False
for calls in itertools.count():
    root = Path(tempfile.mkdtemp(dir=sys.argv[1]))
    with opened() as backend:
        for n in range(8):
            assert put(backend, n, 7000)
    watcher = opened()
    child = os.fork()
    if child == 0:
        attempt(calls)
    survived = os.waitpid(child, 0)[1] == 0
    assert charged(root) <= CAP, calls
    with opened() as backend:
        for n in range(8):
            data = got(backend, n)
            assert data == got(watcher, n), (calls, n)
            assert data is None or data == pattern(n, len(data)), (calls, n)
            assert data is None or len(data) in (7000, 8000 + n, 40_000), (calls, n)
        there = sum(padded(len(got(backend, n))) for n in present(backend, range(8)))
        assert there <= charged(root) <= CAP, calls
        assert put(backend, 9, CAP - 8192) and got(backend, 9) == pattern(9, CAP - 8192), calls
    watcher.close()
    if survived:
        break
print(calls, flush=True)
"""


def test_killed_at_every_call_that_changes_something(tmp_path):
    process = python(KILLED, tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert int(output) > 40


def test_what_killed_writers_left_is_nobodys(tmp_path):
    """Files that were made and not filled, a journal that was about to be replaced."""
    with DiskBackend(tmp_path, max_size=MB, min_free=0) as backend:
        assert put(backend, 1, 5000)
    for number in range(30):
        (tmp_path / f"{number:016x}.segment").write_bytes(bytes(30_000))
    (tmp_path / f"journal.{1:016x}").write_bytes(b"half")
    with (tmp_path / "journal").open("ab") as journal:
        journal.write(b"half a record")
    with DiskBackend(tmp_path, max_size=MB, min_free=0) as backend:
        assert charged_now(tmp_path) == 8192
        assert got(backend, 1) == pattern(1, 5000)
        assert put(backend, 2, 5000)
    with DiskBackend(tmp_path, max_size=MB, min_free=0) as backend:
        assert [got(backend, n) for n in (1, 2)] == [pattern(1, 5000), pattern(2, 5000)]
