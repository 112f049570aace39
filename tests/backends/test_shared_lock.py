from __future__ import annotations

import threading

import pytest

from lmcache.backends.shared_lock import SharedLock
from lmcache.core.errors import BackendClosed, BackendError


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "lock")


@pytest.mark.parametrize("locks", [1, 2], ids=["one-shared-by-threads", "one-each"])
def test_it_excludes(path, locks):
    users = [SharedLock(path) for _ in range(locks)]
    inside, most = [], []

    def work(lock: SharedLock) -> None:
        for n in range(500):
            with lock:
                inside.append(n)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work, args=(users[n % locks],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(most) == 2000
    assert max(most) == 1
    for lock in users:
        lock.close()


def test_a_holder_that_does_not_let_go_fails_the_others(path):
    holder, other = SharedLock(path), SharedLock(path, timeout_s=0.05)
    with holder, pytest.raises(BackendError, match=r"has held .*lock' locked for 0.05 s"), other:
        pass
    with other:
        pass
    holder.close()
    other.close()


def test_a_removed_file_is_noticed(path, tmp_path):
    lock = SharedLock(path)
    lock.check_there()
    (tmp_path / "lock").unlink()
    for _ in range(2):
        with lock, pytest.raises(BackendError, match="was removed; open the backend again"):
            lock.check_there()
    lock.close()


def test_closed_means_closed(path):
    lock = SharedLock(path)
    lock.close()
    lock.close()
    with pytest.raises(BackendClosed), lock:
        pass
    with pytest.raises(BackendClosed):
        lock.check_there()
