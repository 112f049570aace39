"""Which copies count, by what becomes of their requests."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from lmcache.adapters.trtllm import stores as module
from lmcache.adapters.trtllm.step import Step
from lmcache.adapters.trtllm.stores import Copy, Stores
from lmcache.adapters.trtllm.storing import AWAY, CONFIRMED, Storing


class Rank:
    """What a copy is made with: it is over when it may be, and answers are written down."""

    def __init__(self):
        self.may = threading.Event()
        self.published, self.ended = [], []
        self.mover = SimpleNamespace(store=self.store, publish=self.published.append)
        self.progress = SimpleNamespace(end=self.ended.append)
        self.stores = Stores()

    def store(self, moves, region, after):
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


def test_a_copy_counts_when_its_request_is_seen_after_it(rank):
    rank.submit(7)
    rank.stores.seen([7])
    rank.let()
    assert rank.ended == []
    rank.stores.seen([8])
    assert rank.ended == []
    rank.stores.seen([7, 8])
    assert (rank.published, rank.ended) == (["good"], [1])
    rank.stores.seen([7])
    assert rank.ended == [1]


def test_only_what_is_over_counts(rank):
    rank.submit(7, 1)
    rank.let()
    rank.may.clear()
    rank.submit(7, 2)
    rank.stores.seen([7])
    assert rank.ended == [1]
    rank.let()
    rank.stores.seen([7])
    assert rank.ended == [1, 2]


@pytest.mark.parametrize("is_over", [False, True])
def test_a_request_that_is_gone(rank, is_over):
    rank.submit(7)
    if is_over:
        rank.let()
    rank.stores.drop([7, 9])
    assert rank.ended == [1] * is_over, "a slot is in use while it is written to"
    rank.let()
    rank.stores.seen([7])
    assert (rank.published, rank.ended) == ([], [1])


@pytest.mark.parametrize("is_over", [False, True])
def test_a_request_whose_blocks_are_kept(rank, is_over):
    rank.submit(7)
    rank.submit(7, 2)
    if is_over:
        rank.let()
    rank.stores.keep([7, 9])
    assert rank.stores.take_done() == ([7, 9] if is_over else [9])
    rank.let()
    assert (rank.published, rank.ended) == (["good"] * 2, [1, 2])
    assert rank.stores.take_done() == ([] if is_over else [7])
    assert rank.stores.take_done() == []


def test_a_request_may_come_again(rank):
    """Its number is another's, or it has begun anew."""
    rank.submit(7, 1)
    rank.stores.drop([7])
    rank.submit(7, 2)
    rank.let()
    assert rank.ended == [1]
    rank.stores.seen([7])
    assert (len(rank.published), rank.ended) == (1, [1, 2])


@pytest.mark.parametrize("what", ["seen", "keep"])
def test_a_copy_that_failed_does_not_count(rank, what):
    rank.submit(7, moves="bad")
    rank.let()
    getattr(rank.stores, what)([7])
    assert (rank.published, rank.ended) == ([], [1])
    assert rank.stores.take_done() == ([7] if what == "keep" else [])


def test_nobody_waits_for_ever(rank, monkeypatch):
    monkeypatch.setattr(module, "LOST_S", 0.05)
    rank.submit(7, 1)
    rank.let()
    deadline = time.monotonic() + 10
    while not rank.ended:
        assert time.monotonic() < deadline
    rank.submit(8, 2)
    rank.let()
    while len(rank.ended) < 2:
        assert time.monotonic() < deadline
    assert rank.published == []


def test_what_is_under_way_ends_before_it_closes(rank):
    rank.submit(7)
    rank.submit(8)
    closed = threading.Thread(target=rank.stores.close)
    closed.start()
    closed.join(0.05)
    assert closed.is_alive()
    rank.may.set()
    closed.join(10)
    assert not closed.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        rank.submit(9)


class TestStoring:
    @staticmethod
    def tell(storing, number, requests, stores=()):
        step = Step(stores=[(request, []) for request in stores])
        storing.tell(step, number, requests)
        return step.running, step.gone

    def test_who_is_stored_is_spoken_of_from_the_next_pass_on(self):
        storing = Storing()
        assert self.tell(storing, 1, [7, 8], stores=[7]) == ([], [])
        assert self.tell(storing, 2, [7, 8]) == ([7], [])
        assert self.tell(storing, 3, [8]) == ([], [])

    def test_who_stays_away_is_gone_once(self):
        storing = Storing()
        self.tell(storing, 1, [7], stores=[7])
        said = [self.tell(storing, 2 + n, [])[1] for n in range(AWAY + 2)]
        assert said == [[]] * AWAY + [[7], []]
        assert not storing.end(7)

    def test_who_has_lost_its_blocks_may_be_stored_again(self):
        storing = Storing()
        self.tell(storing, 1, [7], stores=[7])
        storing.lose(7)
        storing.lose(9)
        assert self.tell(storing, 2, [7], stores=[7]) == ([], [7])
        assert self.tell(storing, 3, [7]) == ([7], [])
        assert storing.end(7)
        assert not storing.end(7)

    def test_a_long_request_is_named_for_a_while(self):
        storing = Storing()
        self.tell(storing, 1, [7], stores=[7])
        named = [self.tell(storing, 2 + n, [7])[0] for n in range(CONFIRMED + 9)]
        assert named == [[7]] * CONFIRMED + [[]] * 9
        assert storing.end(7), "a slow rank may still be at it"
