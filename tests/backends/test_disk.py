from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import subprocess
import threading
import time

import pytest
from disk_rig import (
    MB,
    charged,
    eventually,
    files,
    free_bytes,
    got,
    grow_old,
    is_settled,
    key,
    ledger_and_truth,
    mounted,
    pattern,
    present,
    put,
    python,
    torn,
    used_bytes,
)

from lmcache.backends.budget import ASIDE
from lmcache.backends.disk import DiskBackend, lmcache_backends
from lmcache.core.errors import BackendClosed, BackendError, ConfigError
from lmcache.testing import BackendSuite


class TestDisk(BackendSuite):
    @pytest.fixture
    def url(self, tmp_path):
        return f"file://{tmp_path}/cache"


class TestDiskThroughThePageCache(BackendSuite):
    @pytest.fixture
    def open_backend(self, tmp_path):
        return lambda: DiskBackend.from_url(f"file://{tmp_path}/cache?direct=false")


class TestFiles:
    def test_they_lie_two_levels_deep_for_their_owner_alone(self, tmp_path):
        root = tmp_path / "new" / "cache"
        old = os.umask(0)
        try:
            with DiskBackend(root) as backend:
                put(backend, 1, 100)
        finally:
            os.umask(old)
        name = key(1).hex()
        path = root / name[:2] / name[2] / f"{name}.kv"
        assert path.read_bytes() == pattern(1, 100)
        assert [p.stat().st_mode & 0o777 for p in (path, root / "usage")] == [0o600, 0o600]
        assert [p.stat().st_mode & 0o777 for p in (*path.parents,)[:3]] == [0o700] * 3

    def test_foreign_ones_are_left_alone_and_not_counted(self, tmp_path):
        name = key(1).hex()
        leaf = tmp_path / name[:2] / name[2]
        leaf.mkdir(parents=True)
        foreign = [
            tmp_path / "README",
            tmp_path / f"{name}.kv",
            tmp_path / name[:2] / "notes.tmp",
            leaf / f"{name}",
            leaf / f"{name.upper()}.kv",
            leaf / f"{name}.tmp",
            leaf / f"{name}.0123.tmp",
        ]
        for path in foreign:
            path.write_bytes(b"x" * 10_000)
            os.utime(path, (0, 0))
        stranger = leaf / f"{key(2).hex()}.kv"  # its name begins like those of another leaf
        stranger.write_bytes(b"x" * 10_000)
        foreign.append(stranger)
        link, folder = (leaf / f"{name[:60]}{end}.kv" for end in ("0000", "1111"))
        link.symlink_to(tmp_path / "README")
        folder.mkdir()
        with DiskBackend(tmp_path, max_size=MB, min_free=0) as backend:
            assert ledger_and_truth(tmp_path)[0] == 0
            for n in range(10, 40):
                assert put(backend, n, 100_000)
        with DiskBackend(tmp_path, max_size=0, min_free=0):
            assert not [
                p for p in files(tmp_path, ".kv") if p not in foreign and not p.is_symlink()
            ]
        assert all(path.read_bytes() == b"x" * 10_000 for path in foreign)
        assert link.is_symlink()
        assert folder.is_dir()

    def test_one_that_vanishes_is_a_miss(self, tmp_path):
        with DiskBackend(tmp_path, max_size=MB, min_free=0) as backend:
            for n in range(9):
                assert put(backend, n, 100_000)
            for path in files(tmp_path, ".kv"):
                path.unlink()
            assert present(backend, range(9)) == []
            assert got(backend, 1) is None
            assert backend.remove(key(1)) is False
            # and its bytes are found to be free
            for n in range(10, 19):
                assert put(backend, n, 100_000)
            assert present(backend, range(10, 19)) == [*range(10, 19)]
            used, truth = ledger_and_truth(tmp_path)
            assert used == truth

    def test_one_that_ends_early_is_a_miss_and_goes(self, tmp_path, monkeypatch):
        real = os.fstat

        def one_more(fd):
            found = real(fd)
            if not os.readlink(f"/proc/self/fd/{fd}").endswith(".kv"):
                return found
            return os.stat_result((*found[:6], found.st_size + 1, *found[7:]))

        with DiskBackend(tmp_path) as backend:
            put(backend, 1, 1000)
            monkeypatch.setattr(os, "fstat", one_more)
            assert got(backend, 1) is None
            monkeypatch.undo()
            assert backend.contains(key(1)) is False
            assert ledger_and_truth(tmp_path) == (0, 0)

    def test_a_removed_directory_is_an_error_that_says_so(self, tmp_path):
        with DiskBackend(tmp_path / "cache") as backend:
            put(backend, 1, 10)
            subprocess.run(["rm", "-rf", tmp_path / "cache"], check=True)
            assert got(backend, 1) is None
            with pytest.raises(BackendError, match="was removed; open the backend again"):
                put(backend, 2, 10)
        assert not (tmp_path / "cache").exists()

    def test_an_empty_object_is_an_object(self, tmp_path):
        with DiskBackend(tmp_path) as backend:
            assert put(backend, 1, 0)
            assert got(backend, 1, room=0) == b""
            assert backend.remove(key(1)) is True


class TestBudget:
    def test_the_cap_holds_at_every_instant(self, tmp_path):
        """Four threads write 100 times the cap; the file system says what is used meanwhile."""
        cap, writers, size = 4 * MB, 4, 130_000
        seen, done = [], threading.Event()
        with mounted(tmp_path / "disk", "size=64m") as root:
            with DiskBackend(root, max_size=cap, min_free=0) as backend:
                before = used_bytes(root)

                def observe() -> None:
                    while not done.is_set():
                        seen.append(used_bytes(root) - before)

                def write(first: int) -> None:
                    for n in range(first, 100 * cap // size, writers):
                        assert put(backend, n, size - n)

                threads = [threading.Thread(target=write, args=(n,)) for n in range(writers)]
                observer = threading.Thread(target=observe)
                for thread in (observer, *threads):
                    thread.start()
                for thread in threads:
                    thread.join(120)
                done.set()
                observer.join(10)
            assert ledger_and_truth(root)[0] == ledger_and_truth(root)[1] <= cap
        assert len(seen) > 100
        assert 0.9 * cap < max(seen) <= cap

    def test_the_cap_is_common_to_all_processes(self, tmp_path):
        cap = 3 * MB
        code = """
root, cap, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with DiskBackend(root, max_size=cap, min_free=0) as backend:
    for n in range(first, first + 250):
        assert put(backend, n, 90_000)
"""
        writers = [python(code, tmp_path, cap, n * 1000) for n in range(3)]
        looks = []
        while any(writer.poll() is None for writer in writers):
            if (tmp_path / "usage").exists():
                looks.append(ledger_and_truth(tmp_path))
            time.sleep(0.001)
        assert [writer.wait() for writer in writers] == [0, 0, 0]
        assert all(truth <= used <= cap for used, truth in looks)
        assert max(truth for _, truth in looks) > 0.9 * cap
        for writer in writers:
            writer.stdout.close()

    def test_a_directory_too_full_shrinks_when_it_is_opened(self, tmp_path):
        with DiskBackend(tmp_path, min_free=0) as backend:
            for n in range(50):
                assert put(backend, n, 200_000)
            grow_old(tmp_path)
            assert got(backend, 3) == pattern(3, 200_000)
        with DiskBackend(tmp_path, max_size=2 * MB, min_free=0) as backend:
            assert charged(tmp_path) <= 2 * MB
            assert present(backend, range(50)) == [3, *range(42, 50)]
            used, truth = ledger_and_truth(tmp_path)
            assert used == truth

    def test_the_floor_too_is_restored_when_it_is_opened(self, tmp_path):
        with mounted(tmp_path / "disk", "size=16m") as root:
            with DiskBackend(root, min_free=0) as backend:
                assert all(put(backend, n, 300_000) for n in range(40))
            with DiskBackend(root, min_free=8 * MB):
                assert 0 <= free_bytes(root) - 8 * MB < 400_000
            # a floor that cannot be reached is no excuse for the cap
            with DiskBackend(root, max_size=2 * MB, min_free=100 * MB):
                assert 0 <= 2 * MB - charged(root) < 400_000

    def test_what_was_there_before_counts(self, tmp_path):
        for first in (0, 10, 20):
            with DiskBackend(tmp_path, max_size=MB, min_free=0) as backend:
                for n in range(first, first + 7):
                    assert put(backend, n, 100_000)
                assert charged(tmp_path) <= MB
        assert charged(tmp_path) > 0.9 * MB

    def test_the_least_recently_used_leave_first_whoever_used_them(self, tmp_path):
        with (
            DiskBackend(tmp_path, max_size=MB, min_free=0) as one,
            DiskBackend(tmp_path, max_size=MB, min_free=0) as two,
        ):
            for n in range(9):
                assert put(one, n, 100_000)
            grow_old(tmp_path)
            assert put(two, 9, 100_000)  # `two` now knows candidates, 0 is gone
            assert got(one, 1)
            assert got(one, 2)
            for n in (10, 11):
                assert put(two, n, 100_000)
            assert present(one, range(12)) == [1, 2, 5, 6, 7, 8, 9, 10, 11]

    def test_an_object_larger_than_the_cap_is_refused_and_evicts_nothing(self, tmp_path):
        with DiskBackend(tmp_path, max_size=MB, min_free=0) as backend:
            assert put(backend, 1, 500_000)
            assert put(backend, 2, MB + 1) is False
            assert present(backend, range(3)) == [1]

    def test_putting_again_is_charged_once(self, tmp_path):
        with DiskBackend(tmp_path, max_size=MB, min_free=0) as backend:
            for size in (10_000, 300_000, 5000):
                assert put(backend, 1, size)
                used, truth = ledger_and_truth(tmp_path)
                assert used == truth
            assert truth == 8192

    def test_the_free_space_floor_holds_at_every_instant(self, tmp_path):
        with mounted(tmp_path / "disk", "size=16m") as root:
            with DiskBackend(root, min_free=10 * MB) as backend:
                for n in range(100):
                    assert put(backend, n, 300_000)
                    assert free_bytes(root) >= 10 * MB
                assert len(present(backend, range(100))) > 10
                # another program takes what was ours to evict, and more
                (root / "other").write_bytes(bytes(9 * MB))
                kept = present(backend, range(100))
                assert put(backend, 200, 300_000) is False
                assert present(backend, range(100)) == kept

    def test_the_floor_is_a_twentieth_of_a_small_disk(self, tmp_path):
        with mounted(tmp_path / "disk", "size=20m") as root:
            with DiskBackend.from_url(f"file://{root}") as backend:
                assert all(put(backend, n, 300_000) for n in range(100))
                assert 0 <= free_bytes(root) - (1 << 20) < 400_000


class TestDamaged:
    def test_it_stays_beside_where_it_was(self, tmp_path):
        with DiskBackend(tmp_path) as backend:
            put(backend, 1, 1000)
            assert backend.discard_damaged(key(1)) is True
            assert (backend.contains(key(1)), got(backend, 1)) == (False, None)
            assert backend.discard_damaged(key(1)) is False
            [aside] = files(tmp_path, ".damaged")
            assert aside.name == f"{key(1).hex()}.damaged"
            assert aside.read_bytes() == pattern(1, 1000)
            put(backend, 1, 1000)
            assert got(backend, 1) == pattern(1, 1000)
            assert ledger_and_truth(tmp_path) == (8192, 8192)

    def test_the_last_of_a_name_stays(self, tmp_path):
        with DiskBackend(tmp_path) as backend:
            for size in (10_000, 100):
                put(backend, 1, size)
                assert backend.discard_damaged(key(1))
            [aside] = files(tmp_path, ".damaged")
            assert aside.read_bytes() == pattern(1, 100)
            assert ledger_and_truth(tmp_path) == (4096, 4096)

    def test_what_is_removed_is_gone_with_it(self, tmp_path):
        with DiskBackend(tmp_path) as backend:
            for _ in range(2):
                put(backend, 1, 100)
                assert backend.discard_damaged(key(1))
            assert backend.remove(key(1)) is False
            assert files(tmp_path, ".damaged") == []
            assert ledger_and_truth(tmp_path) == (0, 0)

    def test_the_last_few_stay(self, tmp_path):
        with DiskBackend(tmp_path) as backend:
            for n in (0, *range(ASIDE), 0, *range(ASIDE, 2 * ASIDE - 1)):
                put(backend, n, 100)
                assert backend.discard_damaged(key(n))
            left = {path.stem for path in files(tmp_path, ".damaged")}
            assert left == {key(n).hex() for n in (0, *range(ASIDE, 2 * ASIDE - 1))}
            assert ledger_and_truth(tmp_path) == (ASIDE * 4096, ASIDE * 4096)

    @pytest.mark.parametrize("reopened", [False, True])
    def test_they_make_room_first(self, tmp_path, reopened):
        backend = DiskBackend(tmp_path, max_size=MB, min_free=0)
        for n in range(9):
            assert put(backend, n, 100_000)
        for n in (7, 8):
            assert backend.discard_damaged(key(n))
        if reopened:
            backend.close()
            (tmp_path / "usage").unlink()
            backend = DiskBackend(tmp_path, max_size=MB, min_free=0)
        for n in (10, 11):
            assert put(backend, n, 100_000)
            used, truth = ledger_and_truth(tmp_path)
            assert used == truth <= MB
        assert present(backend, range(12)) == [*range(7), 10, 11]
        assert files(tmp_path, ".damaged") == []
        backend.close()


class TestFailures:
    def test_a_full_disk_refuses(self, tmp_path):
        """All inodes are taken: a failure that no arithmetic foresees."""
        with mounted(tmp_path / "disk", "size=16m,nr_inodes=40") as root:
            with DiskBackend(root, min_free=0) as backend:
                stored = [n for n in range(60) if put(backend, n, 1000)]
                assert 0 < len(stored) < 60
                assert all(got(backend, n) == pattern(n, 1000) for n in stored)
                assert not files(root, ".tmp")
                used, truth = ledger_and_truth(root)
                assert used == truth

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
    def test_a_write_that_fails_halfway_leaves_nothing(self, tmp_path, monkeypatch, code):
        real = os.pwritev

        def half(fd, views, offset):
            if offset:
                raise OSError(code, os.strerror(code))
            return real(fd, [memoryview(b"".join(views))[:4096].toreadonly()], offset)

        with DiskBackend(tmp_path, direct=False) as backend:
            assert put(backend, 1, 5000)
            monkeypatch.setattr(os, "pwritev", half)
            if code == errno.EIO:
                with pytest.raises(BackendError, match="Input/output error") as caught:
                    put(backend, 2, 5000)
                assert caught.value.__cause__.errno == errno.EIO
            else:
                assert put(backend, 2, 5000) is False
                assert put(backend, 1, 9000) is False
            monkeypatch.undo()
            assert got(backend, 1) == pattern(1, 5000)
            assert got(backend, 2) is None
            assert not files(tmp_path, ".tmp")
            assert ledger_and_truth(tmp_path) == (8192, 8192)
            assert put(backend, 2, 5000)

    def test_blocks_that_cannot_be_had_are_a_refusal(self, tmp_path, monkeypatch):
        def refuse(fd, offset, length):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with DiskBackend(tmp_path) as backend:
            monkeypatch.setattr(os, "posix_fallocate", refuse)
            assert put(backend, 1, 5000) is False
            assert not files(tmp_path, ".tmp")
            assert ledger_and_truth(tmp_path) == (0, 0)

    def test_a_file_system_without_fallocate_will_do(self, tmp_path, monkeypatch):
        def refuse(fd, offset, length):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        with DiskBackend(tmp_path) as backend:
            assert put(backend, 1, 5000)
            assert got(backend, 1) == pattern(1, 5000)
            assert ledger_and_truth(tmp_path) == (8192, 8192)

    def test_closing_under_a_writer(self, tmp_path, monkeypatch):
        real, writing, closed = os.pwritev, threading.Event(), threading.Event()

        def slow(*args):
            writing.set()
            assert closed.wait(10)
            return real(*args)

        failures = []

        def write() -> None:
            try:
                put(backend, 1, 5000)
            except BackendClosed as error:
                failures.append(error)

        backend = DiskBackend(tmp_path)
        monkeypatch.setattr(os, "pwritev", slow)
        thread = threading.Thread(target=write)
        thread.start()
        assert writing.wait(10)
        backend.close()
        closed.set()
        thread.join(10)
        monkeypatch.undo()
        assert len(failures) == 1
        with DiskBackend(tmp_path) as backend:
            assert present(backend, range(3)) == []
            eventually(lambda: not files(tmp_path, ".tmp"))


class TestKilled:
    def test_in_the_middle_of_a_write(self, tmp_path):
        code = """
real = os.pwritev
def half(fd, views, offset):
    real(fd, views, offset)
    print("half", flush=True)
    time.sleep(60)
backend = DiskBackend(sys.argv[1], max_size=10 * MB, min_free=0)
assert put(backend, 1, MB) and put(backend, 2, MB)
os.pwritev = half
backend.put(key(2), pattern(2, 3 * MB))
"""
        writer = python(code, tmp_path)
        assert writer.stdout.readline() == "half\n"
        (half,) = files(tmp_path, ".tmp")
        with DiskBackend(tmp_path, max_size=10 * MB, min_free=0) as backend:
            # it is being written: it counts, and stays
            assert half.exists()
            assert ledger_and_truth(tmp_path)[0] >= 5 * MB
            writer.kill()
            writer.wait()
            writer.stdout.close()
            assert got(backend, 2) == pattern(2, MB)
        with DiskBackend(tmp_path, max_size=10 * MB, min_free=0) as backend:
            eventually(lambda: not half.exists() and is_settled(tmp_path))
            assert [got(backend, n) for n in (1, 2)] == [pattern(1, MB), pattern(2, MB)]
            used, truth = ledger_and_truth(tmp_path)
            assert 2 * MB <= used == truth <= 2 * MB + 8192

    def test_at_any_moment(self, tmp_path):
        """Whole objects or none, and the cap, after twelve kills with a survivor looking on."""
        cap = 3 * MB
        code = """
backend = DiskBackend(sys.argv[1], max_size=int(sys.argv[2]), min_free=0)
print("ready", flush=True)
for n in range(1_000_000):
    assert put(backend, n % 97, 50_000 + 1000 * (n % 97))
"""
        survivor = DiskBackend(tmp_path, max_size=cap, min_free=0)
        for _ in range(12):
            writer = python(code, tmp_path, cap)
            writer.stdout.readline()
            time.sleep(random.uniform(0.001, 0.1))
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            writer.stdout.close()
            used, truth = ledger_and_truth(tmp_path)
            assert truth <= used <= cap
            for n in present(survivor, range(97)):
                assert got(survivor, n) in (None, pattern(n, 50_000 + 1000 * n))
            assert put(survivor, 1000, 10_000)
        survivor.close()
        with DiskBackend(tmp_path, max_size=cap, min_free=0) as backend:
            assert len(present(backend, range(97))) > 15
            eventually(lambda: not torn(tmp_path) and is_settled(tmp_path))

    def test_a_temporary_file_nobody_touched_for_an_hour_goes(self, tmp_path):
        with DiskBackend(tmp_path) as backend:
            put(backend, 1, 10)
        (path,) = files(tmp_path, ".kv")
        temporary = path.with_name(f"{key(1).hex()}.{'0' * 16}.tmp")
        temporary.write_bytes(b"torn")
        with temporary.open() as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with DiskBackend(tmp_path):
                eventually(lambda: is_settled(tmp_path))
                assert temporary.exists()
            os.utime(temporary, (time.time() - 4000,) * 2)
            with DiskBackend(tmp_path):
                eventually(lambda: not temporary.exists())
                eventually(lambda: is_settled(tmp_path))


def test_readers_never_see_foreign_bytes_while_everything_is_evicted(tmp_path):
    wrong = []
    with DiskBackend(tmp_path, max_size=MB, min_free=0) as backend:

        def write(seed: int) -> None:
            numbers = random.Random(seed)
            for _ in range(400):
                assert put(backend, numbers.randrange(40), 70_000)

        def read(seed: int) -> None:
            numbers = random.Random(seed)
            for _ in range(1500):
                n = numbers.randrange(40)
                if got(backend, n, 70_000) not in (None, pattern(n, 70_000)):
                    wrong.append(n)

        threads = [threading.Thread(target=f, args=(s,)) for s in range(2) for f in (read, write)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert not wrong


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file://{0}?max_sise=1GB", "unknown option 'max_sise'.* did you mean 'max_size'"),
        ("file://{0}?max_size=1G", "option 'max_size': '1G' is not a size"),
        ("file://{0}?direct=maybe", "option 'direct': 'maybe' is neither true nor false"),
        ("file://relative/dir", "names no absolute directory; write file:///dir"),
        ("file://", "names no absolute directory"),
        ("file://{0}/file/below", "cannot keep objects in .*Not a directory"),
    ],
)
def test_what_cannot_be_opened(tmp_path, url, message):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=message):
        DiskBackend.from_url(url.format(tmp_path))


def test_a_url_may_hold_any_path(tmp_path):
    with DiskBackend.from_url(f"file://{tmp_path}/a%20b?max_size=1GB&min_free=0") as backend:
        assert put(backend, 1, 10)
    assert (tmp_path / "a b" / "usage").exists()


@pytest.mark.parametrize(("option", "direct"), [("true", True), ("false", False)])
def test_a_url_says_whether_the_page_cache_is_passed(tmp_path, option, direct):
    try:
        backend = DiskBackend.from_url(f"file://{tmp_path}?direct={option}")
    except ConfigError:
        pytest.skip("this file system has no way past the page cache")
    with backend:
        assert backend.is_direct is direct
        assert put(backend, 1, 5000)
        assert got(backend, 1) == pattern(1, 5000)


def test_it_is_offered(tmp_path):
    (spec,) = lmcache_backends()
    assert spec.scheme == "file"
    with spec.open(f"file://{tmp_path}") as backend:
        assert isinstance(backend, DiskBackend)
