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
    eventually,
    files,
    free_bytes,
    got,
    is_settled,
    key,
    ledger_and_truth,
    mounted,
    pattern,
    present,
    put,
    python,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lmcache.backends.disk import DiskBackend

CAPS = st.sampled_from([0, 8192, 50_000, 200_000, 400_000])
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
        assert stored is (-(-size // 4096) * 4096 <= self.cap)
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
        was_there = is_there(self.root, n)
        assert self.backends[which].remove(key(n)) is was_there
        assert not is_there(self.root, n)

    @rule(n=st.integers(0, 20), length=SIZES)
    def somebody_cuts_a_file(self, n, length):
        for path in files(self.root, ".kv")[n : n + 1]:
            size = path.stat().st_size
            with path.open("r+b") as file:
                file.truncate(min(length, size))
            for known in range(16):
                if path.stem == key(known).hex():
                    self.sizes[known].add(min(length, size))

    @rule(n=st.integers(0, 20))
    def somebody_deletes_a_file(self, n):
        for path in files(self.root, ".kv")[n : n + 1]:
            path.unlink()

    @rule(cap=CAPS, direct=MODES)
    def restart(self, cap, direct):
        for backend in self.backends:
            backend.close()
        self.cap = cap
        self.backends = [self._opened(direct), self._opened(direct)]

    @rule()
    def restart_without_a_ledger(self):
        for backend in self.backends:
            backend.close()
        (self.root / "usage").unlink()
        self.backends = [self._opened(None), self._opened(None)]

    @invariant()
    def it_is_within_bounds(self):
        used, truth = ledger_and_truth(self.root)
        assert truth <= used <= self.cap
        assert not files(self.root, ".tmp")

    def teardown(self):
        if hasattr(self, "backends"):
            for backend in self.backends:
                backend.close()
            shutil.rmtree(self.root)


def is_there(root: Path, n: int) -> bool:
    return any(path.stem == key(n).hex() for path in files(root, ".kv"))


TestDirectory = Directory.TestCase
TestDirectory.settings = settings(max_examples=10, stateful_step_count=20, deadline=None)


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), largest=st.integers(10_000, 70_000), direct=MODES)
def test_filled_a_hundred_times_over(tmp_path_factory, seed, largest, direct):
    root, cap = tmp_path_factory.mktemp("cache"), 70_000
    draw, written, n = random.Random(seed), 0, 0
    with DiskBackend(root, max_size=cap, min_free=0, direct=direct) as backend:
        while written < 100 * cap and n < 1000:
            size = draw.randint(largest // 2, largest)
            assert put(backend, n, size)
            assert got(backend, n) == pattern(n, size)
            if n % 100 == 0:
                assert charged(root) <= cap
            written, n = written + size, n + 1
        kept = present(backend, range(n))
        # the newest, as many as there is room for
        assert kept == [*range(n - len(kept), n)]


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
            assert not files(root, ".tmp")
            used, truth = ledger_and_truth(root)
            assert used == truth


KILLED = """
import itertools, signal, tempfile
NAMES = "open mkdir pwrite pwritev posix_fallocate ftruncate utime replace unlink close".split()

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

def attempt(root, calls):
    backend = DiskBackend(root, max_size=20_000, min_free=0)
    backend._budget._survey.wait()
    bomb(calls)
    for n in (1, 3):
        put(backend, n, 8000 + n)
    os._exit(0)

survived = False
for calls in itertools.count():
    root = Path(tempfile.mkdtemp(dir=sys.argv[1]))
    with DiskBackend(root, max_size=20_000, min_free=0) as backend:
        assert put(backend, 1, 7000) and put(backend, 2, 7000)
    child = os.fork()
    if child == 0:
        attempt(root, calls)
    survived = os.waitpid(child, 0)[1] == 0
    used, truth = ledger_and_truth(root)
    assert truth <= used <= 20_480, (calls, used, truth)
    for size, n in ((7000, 1), (8001, 1), (7000, 2), (8003, 3)):
        for path in files(root, ".kv"):
            if path.stem == key(n).hex():
                assert path.stat().st_size in (7000, 8000 + n), (calls, n)
                data = path.read_bytes()
                assert data == pattern(n, len(data)), (calls, n)
    with DiskBackend(root, max_size=20_000, min_free=0) as backend:
        eventually(lambda: not torn(root) and is_settled(root))
        assert put(backend, 9, 16_000) and got(backend, 9) == pattern(9, 16_000)
    if survived:
        break
print(calls, flush=True)
"""


def test_killed_at_every_call_that_changes_something(tmp_path):
    process = python(KILLED, tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert int(output) > 20


def test_killed_files_are_all_found(tmp_path):
    """What a killed writer has charged and not written is free again after a survey."""
    with DiskBackend(tmp_path, max_size=MB, min_free=0) as backend:
        reserved = backend._budget.reserve(key(1).hex(), 300_000, 0)
        assert ledger_and_truth(tmp_path) == (303_104, 303_104)
        Path(reserved.path).unlink()
        backend._budget._survey.wait()
        eventually(lambda: is_settled(tmp_path))
        backend._budget.cancel(reserved)
