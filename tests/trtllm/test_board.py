"""What the leader sees of the copies of all ranks."""

from __future__ import annotations

import threading
import uuid

import pytest

from lmcache.adapters.trtllm import board as module
from lmcache.adapters.trtllm.board import Board


@pytest.fixture
def engine_id():
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def leader(engine_id):
    board = Board.create(engine_id, 2)
    yield board
    board.remove()


def test_a_pass_is_over_when_all_ranks_have_noted_it(engine_id, leader):
    other = Board(engine_id)
    leader.begin(7)
    leader.note(0, 7)
    waiting = threading.Thread(target=leader.wait, args=(7,))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    other.note(1, 7)
    waiting.join(5)
    assert not waiting.is_alive()
    assert leader.wait(7)


def test_so_are_those_before_it(leader):
    leader.begin(8)
    for rank in (0, 1):
        leader.note(rank, 8)
    assert leader.wait(3)


def test_it_is_given_up_when_that_takes_too_long(leader, monkeypatch):
    monkeypatch.setattr(module, "COPIED_S", 0.01)
    leader.begin(7)
    leader.note(0, 7)
    leader.note(1, 6)
    assert not leader.wait(7)


def test_a_pass_that_never_began_is_not_waited_for(leader, monkeypatch):
    monkeypatch.setattr(module, "COPIED_S", 3600)
    leader.begin(6)
    for rank in (0, 1):
        leader.note(rank, 6)
    assert not leader.wait(7)


def test_nothing_is_left_of_it(engine_id, leader):
    other = Board(engine_id)
    leader.remove()
    leader.remove()
    with pytest.raises(FileNotFoundError):
        Board(engine_id)
    leader.begin(1)
    for rank, board in enumerate((leader, other)):
        board.note(rank, 1)
    assert leader.wait(1)


def test_a_name_is_used_once(engine_id, leader):
    with pytest.raises(FileExistsError):
        Board.create(engine_id, 1)
