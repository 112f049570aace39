"""What the leader sees of the copies of all ranks."""

from __future__ import annotations

import stat
import uuid
from concurrent import futures
from pathlib import Path

import pytest

from lmcache.adapters.trtllm import board as module
from lmcache.adapters.trtllm.board import ALL, Board
from lmcache.core.errors import LayoutError


@pytest.fixture
def engine_id():
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def leader(engine_id):
    Board.create(engine_id, 2)
    yield Board(engine_id)
    Board.remove(engine_id)


def note(board, number):
    for rank in (0, 1):
        board.note(rank, number)


def answer_after(last, leader, number):
    """What the leader is told of a pass, which is not before `last()`."""
    with futures.ThreadPoolExecutor(1) as threads:
        answer = threads.submit(leader.wait, number)
        with pytest.raises(futures.TimeoutError):
            answer.result(0.05)
        last()
        return answer.result(1)  # in less than it takes to give up


def test_a_pass_is_over_when_all_ranks_have_noted_it(engine_id, leader):
    other = Board(engine_id)
    leader.begin(7)
    leader.note(0, 7)
    assert answer_after(lambda: other.note(1, 7), leader, 7)


def test_so_are_those_before_it(leader):
    leader.begin(8)
    note(leader, 8)
    assert leader.wait(3)


def test_a_pass_that_failed_was_copied_by_nobody(leader, monkeypatch):
    monkeypatch.setattr(module, "COPIED_S", 20)
    leader.begin(6)
    note(leader, 6)
    assert not leader.wait(7)


def test_but_the_one_before_may_still_be_read(leader):
    leader.begin(6)
    leader.note(0, 6)
    assert not answer_after(lambda: leader.note(1, 6), leader, 7)


def test_a_rank_that_is_stuck_is_waited_for_once(leader, monkeypatch):
    monkeypatch.setattr(module, "COPIED_S", 0.01)
    leader.begin(7)
    leader.note(0, 7)
    leader.note(1, 5)
    assert not leader.wait(7)
    monkeypatch.setattr(module, "COPIED_S", 20)
    assert not leader.wait(7)
    assert leader.wait(5)
    leader.begin(9)
    assert not leader.wait(9)
    note(leader, 9)
    assert leader.wait(9)


def test_one_that_goes_on_is_waited_for_again(leader, monkeypatch):
    monkeypatch.setattr(module, "COPIED_S", 0.01)
    leader.begin(7)
    assert not leader.wait(7)
    monkeypatch.setattr(module, "COPIED_S", 20)
    note(leader, 6)
    assert answer_after(lambda: note(leader, 7), leader, 7)


def test_who_has_closed_reads_nothing_any_more(leader):
    leader.begin(7)
    note(leader, ALL)
    assert leader.wait(7)


def test_nothing_is_left_of_it(engine_id, leader):
    other = Board(engine_id)
    Board.remove(engine_id)
    Board.remove(engine_id)
    with pytest.raises(LayoutError, match="no memory that all ranks share: .*No such file"):
        Board(engine_id)
    leader.begin(1)
    for rank, board in enumerate((leader, other)):
        board.note(rank, 1)
    assert leader.wait(1)


def test_it_is_ours_alone(engine_id, leader):
    mode = module._file_of(engine_id).stat().st_mode
    assert stat.S_IMODE(mode) == 0o600


def test_a_name_is_used_once(engine_id, leader):
    with pytest.raises(LayoutError, match="File exists"):
        Board.create(engine_id, 1)


def test_where_there_is_no_shared_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_file_of", lambda engine_id: Path(tmp_path, "none", engine_id))
    with pytest.raises(LayoutError, match="no memory for all ranks to share"):
        Board.create("one", 1)


def test_where_there_is_no_room(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_file_of", lambda engine_id: tmp_path / engine_id)
    monkeypatch.setattr(module.os, "posix_fallocate", full)
    with pytest.raises(LayoutError, match="no memory for all ranks to share"):
        Board.create("one", 1)
    Board.remove("one")
    assert not list(tmp_path.iterdir())


def full(*_):
    raise OSError(28, "No space left on device")
