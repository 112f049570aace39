from __future__ import annotations

import threading

import pytest

from lmcache.backends.ledger import Ledger
from lmcache.core.errors import BackendClosed, BackendError


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "usage")


def test_the_sum_is_common_and_lasts(path):
    one, two = Ledger(path), Ledger(path)
    with one:
        assert one.used == 0
        one.used += 7
    with two:
        assert two.used == 7
        two.used -= 3
    one.close()
    two.close()
    three = Ledger(path)
    with three:
        assert three.used == 4
    three.close()


def test_it_is_never_negative(path):
    ledger = Ledger(path)
    with ledger:
        ledger.used -= 5
        assert ledger.used == 0
    ledger.close()


@pytest.mark.parametrize("ledgers", [1, 2], ids=["one-shared-by-threads", "one-each"])
def test_it_excludes(path, ledgers):
    users = [Ledger(path) for _ in range(ledgers)]

    def work(ledger: Ledger) -> None:
        for _ in range(500):
            with ledger:
                ledger.used += 1

    threads = [threading.Thread(target=work, args=(users[n % ledgers],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with users[0]:
        assert users[0].used == 2000
    for ledger in users:
        ledger.close()


def test_a_holder_that_does_not_let_go_fails_the_others(path):
    holder, other = Ledger(path), Ledger(path, timeout_s=0.05)
    with holder, pytest.raises(BackendError, match=r"has held .*usage' locked for 0.05 s"), other:
        pass
    with other:
        assert other.used == 0
    holder.close()
    other.close()


def test_a_removed_file_is_noticed(path, tmp_path):
    ledger = Ledger(path)
    (tmp_path / "usage").unlink()
    for _ in range(2):
        with pytest.raises(BackendError, match="was removed; open the backend again"), ledger:
            pass
    ledger.close()


def test_closed_means_closed(path):
    ledger = Ledger(path)
    ledger.close()
    ledger.close()
    with pytest.raises(BackendClosed), ledger:
        pass
    with pytest.raises(BackendClosed):
        ledger.check_open()
