from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache.backends.ledger import LEAVES, Leaf, Ledger
from lmcache.core.errors import BackendClosed, BackendError


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "usage")


def test_the_sum_is_common_and_lasts(path):
    one, two = Ledger(path), Ledger(path)
    with one:
        assert one.used == 0
        one.charge(5, 7)
    with two:
        assert (two.used, two.leaf(5)) == (7, Leaf(7, 1))
        two.charge(5, -3)
        two.charge(LEAVES - 1, 10)
    one.close()
    two.close()
    three = Ledger(path)
    with three:
        assert three.used == 14
        assert three.leaf(5) == Leaf(4, 2)
        assert three.charges() == [0] * 5 + [4] + [0] * (LEAVES - 7) + [10]
    three.close()


def test_a_leaf_is_never_negative(path):
    ledger = Ledger(path)
    with ledger:
        ledger.charge(1, 3)
        ledger.charge(0, -5)
        assert (ledger.used, ledger.leaf(0).charged) == (3, 0)
    ledger.close()


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-50, 100))))
def test_the_sum_is_that_of_the_leaves(tmp_path_factory, changes):
    path = tmp_path_factory.mktemp("ledger") / "usage"
    ledger = Ledger(str(path))
    with ledger:
        for leaf, size in changes:
            ledger.charge(leaf, size)
            assert ledger.used == sum(ledger.charges())
            assert min(ledger.charges()) >= 0
    ledger.close()


def test_only_a_leaf_that_was_left_alone_is_settled(path):
    ledger = Ledger(path)
    with ledger:
        ledger.charge(1, 100)
        ledger.charge(2, 100)
        before, other = ledger.leaf(1), ledger.leaf(2)
        ledger.charge(2, 0)  # something was renamed
        assert ledger.settle(1, before, 30) is True
        assert ledger.settle(2, other, 30) is False
        assert (ledger.used, ledger.leaf(1).charged, ledger.leaf(2).charged) == (130, 30, 100)
        assert ledger.settle(1, before, 90) is False
    ledger.close()


def test_it_is_trusted_once_all_has_been_counted(path):
    with open(path, "wb") as file:
        file.write(b"of something else")
    ledger = Ledger(path)
    with ledger:
        assert ledger.is_counted is False
        ledger.settle(3, ledger.leaf(3), 70)
        ledger.sum_up()
        assert (ledger.is_counted, ledger.used) == (True, sum(ledger.charges()))
    ledger.close()
    again = Ledger(path)
    with again:
        assert again.is_counted is True
    again.close()


@pytest.mark.parametrize("ledgers", [1, 2], ids=["one-shared-by-threads", "one-each"])
def test_it_excludes(path, ledgers):
    users = [Ledger(path) for _ in range(ledgers)]

    def work(ledger: Ledger) -> None:
        for _ in range(500):
            with ledger:
                ledger.charge(7, 1)

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
