"""Which copies count, by what becomes of their requests."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from lmcache.adapters.trtllm import stores as module
from lmcache.adapters.trtllm.step import Step
from lmcache.adapters.trtllm.stores import Copy, Stores
from lmcache.adapters.trtllm.storing import AWAY, Storing


class Rank:
    """What a copy is made with: it is over when it may be, and answers are written down."""

    def __init__(self):
        self.may, self.begun = threading.Event(), threading.Event()
        self.published, self.ended = [], []
        self.mover = SimpleNamespace(store=self.store, publish=self.published.append)
        self.progress = SimpleNamespace(end=self.ended.append)
        self.stores = Stores()

    def store(self, moves, region, after):
        self.begun.set()
        assert self.may.wait(10)
        if moves == "bad":
            raise OSError("the device is gone")
        return 1

    def submit(self, request, step=1, moves="good"):
        event = SimpleNamespace(synchronize=lambda: None)
        self.stores.submit(Copy(request, moves, self, step, 64, event, waits=True))

    def let(self):
        """The copies so far end."""
        self.may.set()
        assert self.stores._pool.wait(10)


@pytest.fixture
def rank():
    rank = Rank()
    yield rank
    rank.may.set()
    rank.stores.close()


def test_a_copy_counts_when_its_request_is_in_the_next_pass(rank):
    rank.submit(7)
    rank.submit(8)
    rank.may.set()
    rank.stores.settle([7, 9])
    assert (rank.published, rank.ended) == (["good"], [1])
    rank.stores.settle([7])
    assert rank.ended == [1]
    rank.stores.settle([8])
    assert rank.ended == [1, 1]


def test_those_that_count_are_waited_for(rank):
    rank.submit(7)
    rank.stores.settle([8])
    settled = threading.Thread(target=rank.stores.settle, args=([7],))
    settled.start()
    settled.join(0.05)
    assert settled.is_alive()
    rank.may.set()
    settled.join(10)
    assert rank.ended == [1]


def test_what_is_waited_for_does_not_expire(rank, monkeypatch):
    monkeypatch.setattr(module, "LOST_S", 0.02)
    rank.submit(7)
    time.sleep(0.1)
    settled = threading.Thread(target=rank.stores.settle, args=([7],))
    settled.start()
    time.sleep(0.1)
    rank.may.set()
    settled.join(10)
    assert rank.published == ["good"]


@pytest.mark.parametrize("is_over", [False, True])
def test_a_request_that_is_gone(rank, is_over):
    rank.submit(7)
    if is_over:
        rank.let()
    rank.stores.drop([7, 9])
    assert rank.ended == [1] * is_over, "a slot is in use while it is written to"
    rank.let()
    rank.stores.settle([7])
    assert (rank.published, rank.ended) == ([], [1])


def test_a_request_may_come_again(rank):
    """Its number is another's, or it has begun anew."""
    rank.submit(7, 1)
    rank.stores.drop([7])
    rank.submit(7, 2)
    rank.let()
    rank.stores.settle([7])
    assert (len(rank.published), sorted(rank.ended)) == (1, [1, 2])


def test_a_copy_that_failed_does_not_count(rank):
    rank.submit(7, moves="bad")
    rank.let()
    rank.stores.settle([7])
    assert (rank.published, rank.ended) == ([], [1])


def test_an_error_of_the_slab_leaves_nothing_unanswered(rank):
    rank.mover.publish = lambda moves: 1 / 0
    for step in (1, 2, 3):
        rank.submit(7, step)
    rank.let()
    with pytest.raises(ZeroDivisionError):
        rank.stores.settle([7])
    assert rank.ended == [1, 2, 3]


def test_nobody_waits_for_ever(rank, monkeypatch):
    monkeypatch.setattr(module, "LOST_S", 0.05)
    deadline = time.monotonic() + 10
    for number in (1, 2):
        rank.submit(number, number)
        rank.let()
        while len(rank.ended) < number:
            assert time.monotonic() < deadline
    assert rank.published == []


def test_what_is_under_way_ends_before_it_closes(rank):
    rank.submit(7)
    rank.submit(8)
    assert rank.begun.wait(10)
    closed = threading.Thread(target=rank.stores.close)
    closed.start()
    closed.join(0.05)
    assert closed.is_alive()
    rank.may.set()
    closed.join(10)
    assert not closed.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        rank.submit(9)
    rank.stores.settle([7, 8, 9])


def test_what_comes_afterwards(rank):
    called = []
    rank.submit(7)
    rank.stores.drop([7])
    rank.stores.afterwards(lambda: called.append(1))
    assert rank.begun.wait(10)
    assert not called, "what does not count is read all the same"
    rank.let()
    assert called == [1]
    rank.stores.close()
    rank.stores.afterwards(lambda: called.append(2))
    assert called == [1, 2]


def test_nobody_waits_for_what_was_dropped_by_closing(rank):
    rank.submit(7)
    rank.submit(8)
    settled = threading.Thread(target=rank.stores.settle, args=([7, 8],))
    settled.start()
    settled.join(0.05)
    assert settled.is_alive()
    closed = threading.Thread(target=rank.stores.close)
    closed.start()
    rank.may.set()
    closed.join(10)
    settled.join(10)
    assert not settled.is_alive()


class TestStoring:
    @staticmethod
    def tell(storing, number, requests, stores=(), copied=0):
        step = Step(stores=[(request, []) for request in stores], pass_number=number)
        away = storing.tell(step, requests, copied)
        return step.running, step.gone, away

    def test_who_was_stored_is_named_in_its_next_pass(self):
        storing = Storing()
        assert self.tell(storing, 1, [7, 8], stores=[7]) == ([], [], [])
        assert self.tell(storing, 2, [8]) == ([], [], [])
        assert self.tell(storing, 3, [7, 8]) == ([7], [], [])
        assert self.tell(storing, 4, [7, 8]) == ([], [], [])

    def test_who_is_stored_in_each_pass_is_named_in_each(self):
        storing = Storing()
        said = [self.tell(storing, 1 + n, [7], stores=[7])[0] for n in range(4)]
        assert said == [[], [7], [7], [7]]

    def test_who_stays_away_is_gone_once(self):
        storing = Storing()
        self.tell(storing, 1, [7], stores=[7])
        said = [self.tell(storing, 2 + n, [])[1:] for n in range(AWAY + 2)]
        assert said == [([], [])] * AWAY + [([7], [7]), ([], [])]

    def test_who_has_lost_its_blocks_may_be_stored_again(self):
        storing = Storing()
        self.tell(storing, 1, [7], stores=[7])
        storing.lose(7)
        storing.lose(9)
        assert self.tell(storing, 2, [7], stores=[7]) == ([], [7], [])
        assert self.tell(storing, 3, [7]) == ([7], [], [])

    def test_who_ends_is_in_no_later_pass(self):
        storing = Storing()
        self.tell(storing, 1, [7, 8], stores=[7, 8])
        self.tell(storing, 2, [8])
        assert [storing.is_unsaid(request) for request in (7, 8, 9)] == [True, False, False]
        storing.end(7)
        assert not storing.is_unsaid(7)
        storing.lose(7)
        assert self.tell(storing, 3, []) == ([], [], [])

    def test_what_is_read_is_known_until_it_was(self):
        """Whatever was said of the request meanwhile."""
        storing = Storing()
        self.tell(storing, 1, [6, 7, 8, 9], stores=[6, 7, 8, 9])
        self.tell(storing, 2, [6, 7], stores=[7])
        storing.lose(8)
        storing.end(9)
        assert [storing.reads(request) for request in (5, 6)] == [0, 1]
        assert storing.reads(6) == 0, "it has ended"
        self.tell(storing, 3, [], copied=1)
        assert [storing.reads(request) for request in (7, 8, 9)] == [2, 0, 0]

    def test_who_has_lost_its_blocks_may_be_read_all_the_same(self):
        storing = Storing()
        self.tell(storing, 1, [7], stores=[7])
        for number in range(2, AWAY + 4):
            self.tell(storing, number, [])
        assert storing.reads(7) == 1
