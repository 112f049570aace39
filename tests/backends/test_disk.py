from __future__ import annotations

import errno
import logging
import os
import random
import signal
import subprocess
import threading
import time
from contextlib import suppress

import pytest
from disk_rig import (
    MB,
    charged,
    charged_now,
    free_bytes,
    got,
    grow_old,
    key,
    mounted,
    pattern,
    present,
    put,
    python,
    segments,
    size_of,
    used_bytes,
)

from lmcache.backends.direct import padded
from lmcache.backends.disk import DiskBackend, lmcache_backends
from lmcache.backends.segments import Segments
from lmcache.core.errors import BackendClosed, BackendError, ConfigError
from lmcache.testing import BackendSuite

NOTICED_S = 0.2
"""After so long a file that is being filled, and was taken away, is left."""


class TestDisk(BackendSuite):
    @pytest.fixture
    def url(self, tmp_path):
        return f"file://{tmp_path}/cache"


class TestDiskThroughThePageCache(BackendSuite):
    @pytest.fixture
    def open_backend(self, tmp_path):
        return lambda: DiskBackend.from_url(f"file://{tmp_path}/cache?direct=false")


def open_at(root, **options) -> DiskBackend:
    return DiskBackend(root, **{"max_size": MB, "min_free": 0, **options})


class TestFiles:
    def test_are_for_their_owner_alone(self, tmp_path):
        root = tmp_path / "new" / "cache"
        old = os.umask(0)
        try:
            with DiskBackend(root) as backend:
                put(backend, 1, 100)
        finally:
            os.umask(old)
        (segment,) = segments(root)
        journal = os.readlink(root / "journal")
        assert {path.name for path in root.iterdir()} == {"lock", "journal", journal, segment.name}
        assert {path.stat().st_mode & 0o777 for path in root.iterdir()} == {0o600}
        assert root.stat().st_mode & 0o777 == 0o700

    def test_hold_objects_one_after_another(self, tmp_path):
        sizes = [100, 4096, 0, 5000, 1]
        with DiskBackend(tmp_path) as backend:
            for n, size in enumerate(sizes):
                assert put(backend, n, size)
        (segment,) = segments(tmp_path)
        data, at = segment.read_bytes(), 0
        for n, size in enumerate(sizes):
            assert data[at : at + size] == pattern(n, size)
            at += padded(size)
        assert len(data) == at  # and nothing of what was kept for more

    def test_that_are_foreign_are_left_alone_and_not_counted(self, tmp_path):
        foreign = ["README", "0" * 15 + ".segment", "0" * 16 + ".Segment", "g" * 16 + ".segment"]
        for name in foreign:
            (tmp_path / name).write_bytes(b"x" * 10_000)
            os.utime(tmp_path / name, (0, 0))
        link, folder = tmp_path / f"{'1' * 16}.segment", tmp_path / f"{'2' * 16}.segment"
        link.symlink_to(tmp_path / "README")
        folder.mkdir()
        with open_at(tmp_path) as backend:
            for n in range(30):
                assert put(backend, n, 100_000)
            assert len(present(backend, range(30))) == 9
        open_at(tmp_path, max_size=0).close()
        assert {path.name for path in tmp_path.glob("*egment")} == {
            *foreign[1:], link.name, folder.name
        }  # fmt: skip
        assert all((tmp_path / name).read_bytes() == b"x" * 10_000 for name in foreign)

    @pytest.mark.parametrize("size", [10_000, 100_000], ids=["many in a file", "one in a file"])
    def test_that_vanish_are_misses(self, tmp_path, size):
        with open_at(tmp_path) as backend:
            for n in range(9):
                assert put(backend, n, size)
            for path in segments(tmp_path):
                path.unlink()
            assert [got(backend, n) for n in range(9)] == [None] * 9
            assert present(backend, range(9)) == []
            assert backend.remove(key(1)) is False
            for n in range(10, 19):
                assert put(backend, n, size)
            assert [got(backend, n) for n in range(10, 19)] == [
                pattern(n, size) for n in range(10, 19)
            ]

    def test_that_vanish_between_are_forgotten_at_the_start(self, tmp_path):
        with open_at(tmp_path) as backend:
            assert put(backend, 1, 100)
        segments(tmp_path)[0].unlink()
        with open_at(tmp_path) as backend:
            assert present(backend, range(3)) == []

    def test_that_end_early_are_misses_and_the_rest_stays(self, tmp_path):
        with open_at(tmp_path) as backend:
            for n in range(3):
                assert put(backend, n, 5000)
            os.truncate(segments(tmp_path)[0], 2 * 8192 + 4096)
            assert got(backend, 2) is None
            assert present(backend, range(3)) == [0, 1]
            assert [got(backend, n) for n in range(2)] == [pattern(n, 5000) for n in range(2)]

    @pytest.mark.parametrize("cut", [0, 4096, 8192, 12_288, 20_000])
    def test_that_are_cut_while_they_are_filled_are_left(self, tmp_path, cut):
        with open_at(tmp_path, max_size=100 * MB) as one, open_at(tmp_path) as two:
            for n in range(3):
                assert put(one, n, 5000)
            os.truncate(segments(tmp_path)[0], cut)
            time.sleep(NOTICED_S)
            for n in range(3, 6):
                assert put(one, n, 5000)
            for backend in (one, two):
                kept = [n for n in range(6) if got(backend, n) == pattern(n, 5000)]
                assert kept == [*range(cut // 8192), 3, 4, 5]
                assert kept == present(backend, range(6))
        with open_at(tmp_path) as backend:
            assert present(backend, range(6)) == kept
            assert all(got(backend, n) == pattern(n, 5000) for n in kept)

    def test_that_are_deleted_while_they_are_filled_are_left(self, tmp_path):
        with open_at(tmp_path) as one, open_at(tmp_path) as two:
            assert put(one, 0, 5000)
            segments(tmp_path)[0].unlink()
            time.sleep(NOTICED_S)
            assert put(one, 1, 5000)
            assert got(two, 1) == pattern(1, 5000)

    def test_that_are_full_are_no_longer_kept_for_who_filled_them(self, tmp_path):
        with open_at(tmp_path, max_size=300_000) as backend:
            assert put(backend, 0, 8192)  # all that a segment has room for here
            for n in range(1, 60):
                assert put(backend, n, 10_000)
            assert present(backend, range(60)) == [*range(60 - 300_000 // 12_288, 60)]

    @pytest.mark.parametrize("cut", [None, 0, 8192])
    def test_that_end_early_are_left_at_the_first_that_is_missed(self, tmp_path, cut, monkeypatch):
        monkeypatch.setattr("lmcache.backends.head._CHECK_S", 1000)
        with open_at(tmp_path) as backend:
            for n in range(3):
                assert put(backend, n, 5000)
            path = segments(tmp_path)[0]
            path.unlink() if cut is None else os.truncate(path, cut)
            assert got(backend, 2) is None
            assert put(backend, 3, 5000)
            assert got(backend, 3) == pattern(3, 5000)
            assert path not in segments(tmp_path) or path.stat().st_size == cut

    def test_that_are_moved_away_are_an_error_that_says_so(self, tmp_path):
        root = tmp_path / "cache"
        with open_at(root) as old:
            assert put(old, 1, 5000)
            root.rename(tmp_path / "old")
            with open_at(root) as new:
                assert put(new, 1, 100_000)
                assert got(old, 2) is None
                with pytest.raises(BackendError, match="was removed; open the backend again"):
                    put(old, 2, 100_000)
                for n in range(3, 30):
                    assert put(new, n, 100_000)
                    assert got(new, n) == pattern(n, 100_000)

    def test_that_are_moved_away_are_filled_no_more(self, tmp_path):
        root = tmp_path / "cache"
        with open_at(root) as old:
            assert put(old, 1, 5000)
            root.rename(tmp_path / "old")
            with open_at(root) as new:
                time.sleep(NOTICED_S)
                assert put(new, 2, 5000)
                for _ in range(3):
                    with pytest.raises(BackendError, match="was removed; open the backend again"):
                        put(old, 2, 5000)
                assert got(new, 2) == pattern(2, 5000)

    @pytest.mark.parametrize("gone", ["", "/lock", "/journal"], ids=["all", "lock", "journal"])
    def test_whose_directory_is_gone_are_an_error_that_says_so(self, tmp_path, gone):
        root = tmp_path / "cache"
        with DiskBackend(root) as backend:
            put(backend, 1, 10)
            subprocess.run(["rm", "-rf", f"{root}{gone}"], check=True)
            assert got(backend, 1) == (pattern(1, 10) if gone == "/lock" else None)
            with pytest.raises(BackendError, match="was removed; open the backend again"):
                put(backend, 2, MB * 300)
            if gone != "/lock":
                with pytest.raises(BackendError, match="was removed; open the backend again"):
                    put(backend, 2, 10)
        assert (tmp_path / "cache").exists() is bool(gone)

    def test_may_hold_nothing(self, tmp_path):
        with DiskBackend(tmp_path) as backend:
            assert put(backend, 1, 0)
            assert got(backend, 1, room=0) == b""
            assert backend.remove(key(1)) is True

    def test_are_written_anew_once_all_in_them_is_gone(self, tmp_path):
        """In place, as blocks that were written before are written faster."""
        with open_at(tmp_path) as backend:
            for n in range(5):
                assert put(backend, n, 100_000)
            inodes = {path.stat().st_ino for path in segments(tmp_path)}
            for n in range(5):
                assert backend.remove(key(n))
            for n in range(10, 15):
                assert put(backend, n, 100_000)
            assert {path.stat().st_ino for path in segments(tmp_path)} == inodes
            assert [got(backend, n) for n in range(10, 15)] == [
                pattern(n, 100_000) for n in range(10, 15)
            ]


class TestBudget:
    @pytest.mark.parametrize("size", [20_000, 130_000])
    def test_the_cap_holds_at_every_instant(self, tmp_path, monkeypatch, size):
        """Four threads write 100 times the cap; the file system says what is used meanwhile."""
        monkeypatch.setattr("lmcache.backends.catalog._SLACK", 10**6)
        cap, writers = 4 * MB, 4
        seen, done = [], threading.Event()
        with mounted(tmp_path / "disk", "size=64m") as root:
            with open_at(root, max_size=cap) as backend:

                def observe() -> None:
                    while not done.is_set():
                        journal = size_of(root / "journal")  # it grows, and is not counted
                        seen.append(used_bytes(root) - journal)

                def write(first: int) -> None:
                    for n in range(first, 100 * cap // size, writers):
                        assert put(backend, n, size - n // 4)

                threads = [threading.Thread(target=write, args=(n,)) for n in range(writers)]
                observer = threading.Thread(target=observe)
                for thread in (observer, *threads):
                    thread.start()
                for thread in threads:
                    thread.join(120)
                done.set()
                observer.join(10)
            assert charged(root) <= cap
        assert len(seen) > 100
        assert 0.9 * cap < max(seen) <= cap + 3 * 4096

    def test_the_cap_is_common_to_all_processes(self, tmp_path):
        cap = 3 * MB
        code = """
root, cap, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with DiskBackend(root, max_size=cap, min_free=0) as backend:
    for n in range(first, first + 250):
        assert put(backend, n, 90_000 - 100 * n % 80_000)
"""
        writers = [python(code, tmp_path, cap, n * 1000) for n in range(3)]
        looks = []
        while any(writer.poll() is None for writer in writers):
            looks.append(charged_now(tmp_path))
            time.sleep(0.001)
        assert [writer.wait() for writer in writers] == [0, 0, 0]
        assert 0.9 * cap < max(looks) <= cap
        for writer in writers:
            writer.stdout.close()

    def test_a_directory_too_full_shrinks_when_it_is_opened(self, tmp_path):
        with open_at(tmp_path, max_size=12 * MB) as backend:
            for n in range(50):
                assert put(backend, n, 200_000)
            grow_old(tmp_path)
            assert got(backend, 3) == pattern(3, 200_000)
        with open_at(tmp_path, max_size=2 * MB) as backend:
            assert charged(tmp_path) <= 2 * MB
            assert present(backend, range(50)) == [3, *range(42, 50)]

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
            with open_at(tmp_path) as backend:
                for n in range(first, first + 7):
                    assert put(backend, n, 100_000)
                assert charged(tmp_path) <= MB
        assert charged(tmp_path) > 0.9 * MB

    def test_the_least_recently_used_leave_first_whoever_used_them(self, tmp_path):
        with open_at(tmp_path) as one, open_at(tmp_path) as two:
            for n in range(9):
                assert put(one, n, 100_000)
            grow_old(tmp_path)
            assert put(two, 9, 100_000)
            assert got(one, 1)
            assert got(one, 2)
            for n in (10, 11):
                assert put(two, n, 100_000)
            assert present(one, range(12)) == [1, 2, 5, 6, 7, 8, 9, 10, 11]

    def test_what_lies_together_leaves_together(self, tmp_path):
        """Three in each segment; one that is used keeps the other two."""
        with open_at(tmp_path) as backend:
            for n in range(90):
                assert put(backend, n, 8000)
            grow_old(tmp_path)
            assert got(backend, 4)
            for n in range(100, 150):
                assert put(backend, n, 8000)
            kept = present(backend, range(90))
            assert kept[:3] == [3, 4, 5]
            assert kept[3:] == [*range(kept[3], 90)]
            assert kept[3] % 3 == 0 < kept[3]

    def test_what_is_removed_or_replaced_makes_room_first(self, tmp_path):
        with open_at(tmp_path) as backend:
            for n in range(9):
                assert put(backend, n, 100_000)
            assert backend.remove(key(7))
            for _ in range(20):
                assert put(backend, 8, 100_000)
            assert present(backend, range(9)) == [*range(7), 8]
            assert got(backend, 8) == pattern(8, 100_000)

    def test_an_object_larger_than_the_cap_is_refused_and_evicts_nothing(self, tmp_path):
        with open_at(tmp_path) as backend:
            assert put(backend, 1, 500_000)
            assert put(backend, 2, 1000)
            assert put(backend, 3, MB + 1) is False
            assert present(backend, range(4)) == [1, 2]

    def test_an_object_as_large_as_the_cap_has_all_of_it(self, tmp_path):
        with open_at(tmp_path, max_size=245 * 4096) as backend:
            assert put(backend, 1, 500_000)
            assert put(backend, 2, 1000)
            assert put(backend, 3, 245 * 4096)
            assert present(backend, range(4)) == [3]

    def test_what_another_fills_stays(self, tmp_path):
        with open_at(tmp_path) as one, open_at(tmp_path) as two:
            assert put(one, 1, 5000)
            for n in range(10, 60):
                assert put(two, n, 100_000)
            assert got(two, 1) == pattern(1, 5000)
            assert put(two, 2, MB) is False

    def test_what_has_no_room_beside_that_evicts_nothing(self, tmp_path):
        with open_at(tmp_path) as one, open_at(tmp_path) as two:
            assert put(one, 1, 5000)
            for n in range(10, 19):
                assert put(two, n, 100_000)
            assert put(two, 2, MB - 5000) is False
            assert put(two, 3, MB + 5000) is False
            assert present(two, range(19)) == [1, *range(10, 19)]

    def test_what_is_stored_while_another_starts_stays(self, tmp_path, monkeypatch):
        real, busy = Segments.take, open_at(tmp_path, max_size=100 * MB)
        assert put(busy, 1, 5000)

        def take(*args):
            monkeypatch.undo()
            assert put(busy, 2, 5000)
            busy.close()
            return real(*args)

        monkeypatch.setattr(Segments, "take", take)
        with open_at(tmp_path, max_size=100 * MB) as backend:
            assert [got(backend, n) for n in (1, 2)] == [pattern(1, 5000), pattern(2, 5000)]

    def test_a_child_keeps_nothing_locked(self, tmp_path):
        with open_at(tmp_path) as backend:
            for n in range(3):
                assert put(backend, n, 20_000)  # one in each segment, of which one is being filled
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            try:
                for n in range(10, 60):
                    assert put(backend, n, 20_000)
                assert present(backend, range(10)) == []
            finally:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)

    def test_the_free_space_floor_holds_at_every_instant(self, tmp_path):
        with mounted(tmp_path / "disk", "size=16m") as root:
            with DiskBackend(root, min_free=10 * MB) as backend:
                for n in range(100):
                    assert put(backend, n, 300_000)
                    assert free_bytes(root) >= 10 * MB - size_of(root / "journal") - 4096
                assert len(present(backend, range(100))) > 10
                # another program takes what was ours to evict, and more
                (root / "other").write_bytes(bytes(9 * MB))
                kept = present(backend, range(100))
                assert put(backend, 200, 600_000) is False
                assert present(backend, range(100)) == kept

    def test_the_floor_is_a_twentieth_of_a_small_disk(self, tmp_path):
        with mounted(tmp_path / "disk", "size=20m") as root:
            with DiskBackend.from_url(f"file://{root}") as backend:
                assert all(put(backend, n, 300_000) for n in range(100))
            assert 0 <= free_bytes(root) - (1 << 20) < 700_000


class TestDamaged:
    def test_it_stays_and_is_not_found(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("lmcache"), "propagate", True)
        with DiskBackend(tmp_path) as backend:
            put(backend, 1, 5000)
            put(backend, 2, 1000)
            assert backend.discard_damaged(key(2)) is True
            assert (backend.contains(key(2)), got(backend, 2)) == (False, None)
            assert backend.discard_damaged(key(2)) is False
            assert backend.remove(key(2)) is False
            (segment,) = segments(tmp_path)
            assert f"damaged: 1000 bytes at 8192 of {segment}" in caplog.text
            assert segment.read_bytes()[8192:9192] == pattern(2, 1000)
            put(backend, 2, 1000)
            assert got(backend, 2) == pattern(2, 1000)

    @pytest.mark.parametrize("reopened", [False, True])
    def test_it_makes_room_first(self, tmp_path, reopened):
        backend = open_at(tmp_path)
        for n in range(9):
            assert put(backend, n, 100_000)
        for n in (7, 8):
            assert backend.discard_damaged(key(n))
        if reopened:
            backend.close()
            backend = open_at(tmp_path)
        for n in (10, 11):
            assert put(backend, n, 100_000)
            assert charged(tmp_path) <= MB
        assert present(backend, range(12)) == [*range(7), 10, 11]
        backend.close()


class TestFailures:
    def test_a_disk_that_is_full_unforeseen_makes_room(self, tmp_path):
        """All inodes are taken: a failure that no arithmetic foresees."""
        with mounted(tmp_path / "disk", "size=16m,nr_inodes=10") as root:
            with DiskBackend(root, min_free=0) as backend:
                assert all(put(backend, n, 600_000) for n in range(20))
                kept = present(backend, range(20))
                assert kept == [*range(20 - len(kept), 20)]
                assert 2 < len(kept) < 10
                assert all(got(backend, n) == pattern(n, 600_000) for n in kept)
                assert charged(root) == len(kept) * padded(600_000)

    def test_a_quota_makes_room_or_refuses(self, tmp_path, monkeypatch):
        real = os.posix_fallocate

        def quota(fd, offset, length):
            others = charged(tmp_path) - os.fstat(fd).st_size
            if others + length > 500_000:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
            real(fd, offset, length)

        monkeypatch.setattr(os, "posix_fallocate", quota)
        with open_at(tmp_path) as backend:
            for n in range(20):
                assert put(backend, n, 100_000)
            assert present(backend, range(20)) == [*range(16, 20)]
            assert put(backend, 30, 600_000) is False
            assert put(backend, 31, 100_000)
            assert charged(tmp_path) <= 500_000

    def test_a_full_disk_without_fallocate_makes_room(self, tmp_path, monkeypatch):
        def refuse(fd, offset, length):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        with mounted(tmp_path / "disk", "size=16m") as root:
            (root / "other").write_bytes(bytes(11 * MB))
            with open_at(root, max_size=10 * MB) as backend:
                answers = [put(backend, n, 90_000) for n in range(200)]
                assert answers[-50:].count(True) > 25
                kept = present(backend, range(200))
                assert len(kept) > 10
                assert all(answers[n] and got(backend, n) == pattern(n, 90_000) for n in kept)

    @pytest.mark.parametrize("call", ["rename", "ftruncate", "posix_fallocate", "statvfs", "utime"])
    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
    def test_a_call_that_fails_leaves_nothing_open(self, tmp_path, monkeypatch, call, code):
        def refuse(*_, **__):
            raise OSError(code, os.strerror(code))

        backend = open_at(tmp_path)
        for n in range(60):
            assert put(backend, n, (8000, 100_000)[n % 2])
        before = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            for n in range(100, 160):
                with suppress(BackendError):
                    put(backend, n, (8000, 100_000)[n % 2])
            assert all(got(backend, n) == pattern(n, (8000, 100_000)[n % 2])
                       for n in present(backend, range(160)))  # fmt: skip
            assert len(os.listdir("/proc/self/fd")) <= before + 1
        for n in range(200, 260):
            assert put(backend, n, 8000)
        assert got(backend, 259) == pattern(259, 8000)
        assert charged(tmp_path) <= MB
        backend.close()
        assert len(os.listdir("/proc/self/fd")) <= before - 2

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
    def test_a_write_that_fails_halfway_leaves_nothing(self, tmp_path, monkeypatch, code):
        def half(fd, data, offset):
            real(fd, data[:4096], offset)
            raise OSError(code, os.strerror(code))

        real = os.pwrite
        with DiskBackend(tmp_path, direct=False) as backend:
            assert put(backend, 1, 5000)
            monkeypatch.setattr(os, "pwrite", half)
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
            assert put(backend, 2, 5000)
            assert got(backend, 2) == pattern(2, 5000)
        open_at(tmp_path).close()
        assert charged(tmp_path) <= 3 * 8192

    @pytest.mark.parametrize("size", [5000, 400 * MB], ids=["in a segment", "of its own"])
    def test_blocks_that_cannot_be_had_are_a_refusal(self, tmp_path, monkeypatch, size):
        def refuse(fd, offset, length):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with DiskBackend(tmp_path, min_free=0) as backend:
            monkeypatch.setattr(os, "posix_fallocate", refuse)
            assert put(backend, 1, size) is False
            assert segments(tmp_path) == []

    def test_a_file_system_without_fallocate_will_do(self, tmp_path, monkeypatch):
        def refuse(fd, offset, length):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        with open_at(tmp_path) as backend:
            for n in range(40):
                assert put(backend, n, 50_000)
                assert got(backend, n) == pattern(n, 50_000)
                assert charged(tmp_path) <= MB

    def test_a_record_that_cannot_be_kept_is_a_refusal(self, tmp_path, monkeypatch):
        with open_at(tmp_path) as backend:
            assert put(backend, 1, 5000)
            monkeypatch.setattr(os, "write", lambda fd, data: 0)
            assert put(backend, 2, 5000) is False
            # what cannot be noted is evicted all the same, and never written again
            first = segments(tmp_path)[0]
            assert put(backend, 3, 990_000) is False
            assert not first.exists()
            monkeypatch.undo()
            assert got(backend, 1) is None
            assert put(backend, 3, 990_000)
            assert got(backend, 3) == pattern(3, 990_000)

    def test_a_miss_where_nothing_can_be_noted_is_a_miss(self, tmp_path, monkeypatch):
        with open_at(tmp_path) as one, open_at(tmp_path) as two:
            assert put(one, 1, 5000)
            segments(tmp_path)[0].unlink()
            monkeypatch.setattr(os, "write", lambda fd, data: 0)
            assert got(two, 1) is None
            assert not two.contains(key(1))
            open_at(tmp_path).close()

    def test_closing_under_a_writer(self, tmp_path, monkeypatch):
        real, writing, closed = os.pwrite, threading.Event(), threading.Event()

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

        backend = DiskBackend(tmp_path, direct=False)
        monkeypatch.setattr(os, "pwrite", slow)
        thread = threading.Thread(target=write)
        thread.start()
        assert writing.wait(10)
        backend.close()
        closed.set()
        thread.join(10)
        monkeypatch.undo()
        assert len(failures) == 1
        assert charged(tmp_path) <= 8192
        with DiskBackend(tmp_path) as backend:
            assert present(backend, range(3)) == []
        assert segments(tmp_path) == []


class TestKilled:
    def test_in_the_middle_of_a_write(self, tmp_path):
        code = """
real = os.pwrite
def half(fd, data, offset):
    real(fd, data[:4096], offset)
    print("half", flush=True)
    time.sleep(60)
backend = DiskBackend(sys.argv[1], max_size=10 * MB, min_free=0, direct=False)
assert put(backend, 1, MB) and put(backend, 2, MB)
os.pwrite = half
backend.put(key(2), pattern(2, 3 * MB))
"""
        writer = python(code, tmp_path)
        assert writer.stdout.readline() == "half\n"
        with open_at(tmp_path, max_size=10 * MB) as backend:
            # it is being written: it counts, and stays
            (half,) = (path for path in segments(tmp_path) if size_of(path) > 2 * MB)
            for n in range(10, 30):
                assert put(backend, n, MB)
                assert charged(tmp_path) <= 10 * MB
            assert half.exists()
            writer.kill()
            writer.wait()
            writer.stdout.close()
            assert got(backend, 2) in (None, pattern(2, MB))
        with open_at(tmp_path, max_size=10 * MB) as backend:
            assert not half.exists()
            assert charged(tmp_path) == len(present(backend, range(30))) * padded(MB)

    def test_what_was_kept_for_more_is_given_back(self, tmp_path):
        code = """
backend = DiskBackend(sys.argv[1], max_size=640 * 4096, min_free=0)
assert put(backend, 1, 5000)
os.kill(os.getpid(), 9)
"""
        python(code, tmp_path).communicate()
        assert charged(tmp_path) == 20 * 4096
        (segment,) = segments(tmp_path)
        used_ns = segment.stat().st_mtime_ns
        with open_at(tmp_path) as backend:
            assert charged(tmp_path) == 8192
            assert segment.stat().st_mtime_ns == used_ns
            assert got(backend, 1) == pattern(1, 5000)

    def test_at_any_moment(self, tmp_path):
        """Whole objects or none, and the cap, after twelve kills with a survivor looking on."""
        cap = 3 * MB
        code = """
backend = DiskBackend(sys.argv[1], max_size=int(sys.argv[2]), min_free=0)
print("ready", flush=True)
for n in range(1_000_000):
    assert put(backend, n % 97, 50_000 + 1000 * (n % 97))
"""
        survivor = open_at(tmp_path, max_size=cap)
        for _ in range(12):
            writer = python(code, tmp_path, cap)
            writer.stdout.readline()
            time.sleep(random.uniform(0.001, 0.1))
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            writer.stdout.close()
            assert charged_now(tmp_path) <= cap
            for n in present(survivor, range(97)):
                assert got(survivor, n) in (None, pattern(n, 50_000 + 1000 * n))
            assert put(survivor, 1000, 10_000)
        survivor.close()
        with open_at(tmp_path, max_size=cap) as backend:
            assert len(present(backend, range(97))) > 15


class TestReaders:
    @pytest.mark.parametrize("size", [70_000, 9000])
    def test_never_see_foreign_bytes_while_everything_is_evicted(self, tmp_path, size):
        wrong, hits = [], []
        with open_at(tmp_path) as backend:

            def write(seed: int) -> None:
                numbers = random.Random(seed)
                for _ in range(600):
                    assert put(backend, numbers.randrange(40 * 70_000 // size), size)

            def read(seed: int) -> None:
                numbers = random.Random(seed)
                for _ in range(2000):
                    n = numbers.randrange(40 * 70_000 // size)
                    data = got(backend, n, size)
                    if data is not None:
                        (hits if data == pattern(n, size) else wrong).append(n)

            work = [(f, s) for s in range(2) for f in (read, write)]
            threads = [threading.Thread(target=f, args=(s,)) for f, s in work]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
        assert not wrong
        assert len(hits) > 100

    @pytest.mark.parametrize("is_back", [False, True], ids=["gone", "gone and back"])
    def test_find_out_that_others_wrote_where_they_read(self, tmp_path, monkeypatch, is_back):
        """A slow one: what it reads makes room meanwhile, and its blocks are written anew."""
        real = os.preadv

        def slow(*args):
            monkeypatch.undo()
            assert put(two, 2, 100_000)
            count = real(*args)
            if is_back:
                assert put(two, 1, 100_000)
            return count

        with open_at(tmp_path, max_size=25 * 4096) as one:
            with open_at(tmp_path, max_size=25 * 4096) as two:
                assert put(one, 1, 100_000)
                monkeypatch.setattr(os, "preadv", slow)
                assert got(one, 1) == (pattern(1, 100_000) if is_back else None)


class TestSeveral:
    def test_see_at_once_what_others_do(self, tmp_path):
        with open_at(tmp_path) as one, open_at(tmp_path) as two:
            for n in range(20):
                writer, reader = (one, two) if n % 2 else (two, one)
                assert not reader.contains(key(n))
                assert put(writer, n, 3000)
                assert reader.contains(key(n))
                assert got(reader, n) == pattern(n, 3000)
                if n % 3 == 0:
                    assert reader.remove(key(n))
                    assert (writer.contains(key(n)), got(writer, n)) == (False, None)
            keys = [key(n) for n in (1, 2, 4, 5, 6, 7)]
            assert [one.count_leading(keys), two.count_leading(keys)] == [4, 4]

    def test_agree_after_the_journal_was_shortened(self, tmp_path, monkeypatch):
        monkeypatch.setattr("lmcache.backends.catalog._SLACK", 5)
        with open_at(tmp_path) as one, open_at(tmp_path) as two:
            longest = 0
            for n in range(300):
                assert put((one, two)[n % 2], n % 50, 5000 + n)
                if n % 7 == 0:
                    assert two.remove(key(n % 50))
                assert present(one, range(50)) == present(two, range(50))
                longest = max(longest, size_of(tmp_path / "journal"))
            kept = present(one, range(50))
            assert len(kept) > 30
            assert longest < 64 * (2 * 50 + 5 + 40)
        with open_at(tmp_path) as backend:
            assert present(backend, range(50)) == kept
            for n in kept:
                assert got(backend, n)[:5000] == pattern(n, 5000)

    def test_of_another_process_see_it_too(self, tmp_path):
        code = """
backend = DiskBackend(sys.argv[1], max_size=MB, min_free=0)
for line in sys.stdin:
    n = int(line)
    print(got(backend, n) == pattern(n, 5000), put(backend, n + 1, 5000), flush=True)
"""
        other = python(code, tmp_path, stdin=subprocess.PIPE)
        with open_at(tmp_path) as backend:
            for n in range(0, 20, 2):
                assert put(backend, n, 5000)
                other.stdin.write(f"{n}\n")
                other.stdin.flush()
                assert other.stdout.readline() == "True True\n"
                assert got(backend, n + 1) == pattern(n + 1, 5000)
        other.communicate()


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
    assert (tmp_path / "a b" / "journal").exists()


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
