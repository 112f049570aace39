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
        self.made, self.published, self.ended = [], [], []
        self.mover = SimpleNamespace(store=self.store, publish=self.published.append)
        self.progress = SimpleNamespace(end=self.ended.append)
        self.stores = Stores()

    def store(self, moves, region, after):
        self.begun.set()
        assert self.may.wait(10)
        if moves == "bad":
            raise OSError("the device is gone")
        self.made.append(moves)
        return 1

    def add(self, request, step=1, moves="good"):
        event = SimpleNamespace(synchronize=lambda: None)
        self.stores.add(Copy(request, moves, self, step, 64, event, waits=True))

    def begin(self, call, *args, **named):
        """A call on a thread, which is held up by a copy."""
        thread = threading.Thread(target=call, args=args, kwargs=named)
        thread.start()
        assert self.begun.wait(10)
        thread.join(0.05)
        assert thread.is_alive()
        return thread

    def end(self, *threads):
        """The copies so far end, and so do calls that they hold up."""
        self.may.set()
        assert self.stores._pool.wait(10)
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def rank():
    rank = Rank()
    yield rank
    rank.may.set()
    rank.stores.close()


def test_nothing_is_read_before_there_is_a_word_about_it(rank):
    rank.may.set()
    rank.add(7)
    rank.stores.settle([8])
    rank.stores.copy(9)
    assert rank.stores.take_ended([10], is_idle=True) == [10]
    assert not rank.stores._pool._threads
    assert (rank.made, rank.ended) == ([], [])


def test_a_copy_counts_when_its_request_is_in_the_next_pass(rank):
    rank.add(7)
    rank.add(8)
    rank.may.set()
    rank.stores.settle([7, 9])
    assert (rank.made, rank.published, rank.ended) == (["good"], ["good"], [1])
    rank.stores.settle([7])
    assert rank.ended == [1]
    rank.stores.settle([8])
    assert rank.ended == [1, 1]


def test_a_pass_goes_on_when_its_requests_are_copied(rank):
    rank.add(7)
    settled = rank.begin(rank.stores.settle, [7])
    rank.end(settled)
    assert (rank.published, rank.ended) == (["good"], [1])


def test_what_is_about_to_go_is_copied_and_counts_later(rank):
    rank.add(7)
    rank.end(rank.begin(rank.stores.copy, 7))
    rank.stores.copy(7)
    assert (rank.made, rank.published, rank.ended) == (["good"], [], [])
    assert rank.stores.take_ended([7], is_idle=False) == [7]
    rank.stores.settle([7])
    assert (rank.made, rank.published, rank.ended) == (["good"], ["good"], [1])


def test_or_not_if_its_blocks_have_not_stayed(rank):
    rank.may.set()
    rank.add(7)
    rank.stores.copy(7)
    rank.stores.drop([7])
    assert (rank.made, rank.published, rank.ended) == (["good"], [], [1])


def test_what_is_kept_is_copied_while_others_run(rank):
    rank.add(7)
    rank.add(8)
    assert rank.stores.take_ended([7, 9], is_idle=False) == [9]
    assert rank.begun.wait(10)
    assert rank.stores.take_ended([], is_idle=True) == []
    rank.end()
    assert rank.stores.take_ended([], is_idle=False) == [7]
    assert rank.stores.take_ended([], is_idle=False) == []
    rank.stores.settle([7])
    assert (rank.made, rank.ended) == (["good"], [1])


def test_what_is_waited_for_does_not_expire(rank, monkeypatch):
    monkeypatch.setattr(module, "LOST_S", 0.02)
    rank.add(7)
    rank.stores.take_ended([7], is_idle=False)
    time.sleep(0.1)
    assert rank.ended == []
    settled = rank.begin(rank.stores.settle, [7])
    time.sleep(0.1)
    rank.end(settled)
    assert (rank.published, rank.ended) == (["good"], [1])


def test_nor_does_what_is_being_copied(rank, monkeypatch):
    monkeypatch.setattr(module, "LOST_S", 0.02)
    rank.add(7)
    copied = rank.begin(rank.stores.copy, 7)
    time.sleep(0.1)
    assert len(rank.stores._copies) == 1
    rank.end(copied)


def test_nor_does_what_is_kept_until_it_is_asked_for(rank, monkeypatch):
    monkeypatch.setattr(module, "LOST_S", 0.02)
    rank.add(7)
    rank.stores.take_ended([7], is_idle=False)
    rank.end()
    time.sleep(0.1)
    assert rank.stores.take_ended([], is_idle=False) == [7]
    rank.stores.settle([7])
    assert (rank.published, rank.ended) == (["good"], [1])


def test_a_copy_that_cannot_be_watched_is_not_there(rank, monkeypatch):
    def start(timer):
        raise RuntimeError("can't start new thread")

    rank.may.set()
    rank.stores.start()
    monkeypatch.setattr(module.threading.Timer, "start", start)
    with pytest.raises(RuntimeError, match="new thread"):
        rank.add(7)
    monkeypatch.undo()
    rank.stores.settle([7])
    assert (rank.made, rank.ended) == ([], [])


def test_a_request_that_is_gone(rank):
    rank.add(7)
    rank.stores.drop([7, 9])
    assert rank.ended == [1]
    rank.stores.settle([7])
    assert (rank.made, rank.published, rank.ended) == ([], [], [1])


def test_one_that_is_gone_while_it_is_copied(rank):
    rank.add(7)
    copied = rank.begin(rank.stores.copy, 7)
    rank.stores.drop([7])
    assert rank.ended == [], "a slot is in use while it is written to"
    rank.end(copied)
    rank.stores.settle([7])
    assert (rank.published, rank.ended) == ([], [1])


def test_a_request_may_come_again(rank):
    """Its number is another's, or it has begun anew."""
    rank.may.set()
    rank.add(7, 1)
    rank.stores.drop([7])
    rank.add(7, 2)
    rank.stores.settle([7])
    assert (len(rank.published), sorted(rank.ended)) == (1, [1, 2])


def test_a_copy_that_failed_does_not_count(rank):
    rank.may.set()
    rank.add(7, moves="bad")
    rank.stores.settle([7])
    assert (rank.published, rank.ended) == ([], [1])


def test_an_error_of_the_slab_leaves_nothing_unanswered(rank):
    rank.mover.publish = lambda moves: 1 / 0
    rank.may.set()
    for step in (1, 2, 3):
        rank.add(7, step)
    with pytest.raises(ZeroDivisionError):
        rank.stores.settle([7])
    assert rank.ended == [1, 2, 3]


def test_nobody_waits_for_ever(rank, monkeypatch):
    monkeypatch.setattr(module, "LOST_S", 0.05)
    rank.may.set()
    deadline = time.monotonic() + 10
    for number in (1, 2):
        rank.add(number, number)
        rank.stores.copy(number) if number == 2 else None
        while len(rank.ended) < number:
            assert time.monotonic() < deadline
    assert rank.published == []


def test_what_is_under_way_ends_before_it_closes(rank):
    rank.add(7)
    rank.add(8)
    settled = rank.begin(rank.stores.settle, [7, 8])
    closed = rank.begin(rank.stores.close)
    rank.may.set()
    for thread in (settled, closed):
        thread.join(10)
        assert not thread.is_alive()
    assert rank.made == ["good"]


def test_nothing_is_read_after_it_has_closed(rank):
    rank.may.set()
    rank.add(7)
    rank.stores.close()
    rank.add(8)
    for request in (7, 8):
        rank.stores.copy(request)
        rank.stores.settle([request])
    assert rank.stores.take_ended([7, 8], is_idle=True) == [7, 8]
    assert rank.made == []


class TestStoring:
    @staticmethod
    def tell(storing, number, requests, stores=()):
        step = Step(stores=[(request, []) for request in stores], pass_number=number)
        away = storing.tell(step, requests)
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
        assert [storing.unsaid(request) for request in (7, 8, 9)] == [1, 0, 0]
        storing.end(7)
        assert not storing.unsaid(7)
        storing.lose(7)
        assert self.tell(storing, 3, []) == ([], [], [])

    def test_what_was_not_sent_is_said_later(self):
        storing = Storing()
        self.tell(storing, 1, [7, 8], stores=[7, 8])
        storing.lose(8)
        step = Step(pass_number=2)
        storing.tell(step, [7])
        storing.take_back(step)
        assert self.tell(storing, 3, [7]) == ([], [7, 8], [])
