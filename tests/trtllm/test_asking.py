"""How the leader has all ranks copy something, and when it knows that they do not read any more."""

from __future__ import annotations

import stat
import subprocess
import sys
import threading
import time
import uuid
from concurrent import futures
from pathlib import Path

import pytest

from lmcache.adapters.trtllm import asking as module
from lmcache.adapters.trtllm.asking import Answerer, Asker, make_pipes, remove_pipes
from lmcache.core.errors import LayoutError


@pytest.fixture
def engine_id():
    engine_id = f"test-{uuid.uuid4().hex}"
    make_pipes(engine_id, 2)
    yield engine_id
    remove_pipes(engine_id)


PASS = 3
"""The one that is over, and of which it is asked."""


class Rank:
    """One that copies when it may."""

    def __init__(self, engine_id, number):
        self.answerer = Answerer(engine_id, number)
        self.asked, self.copied = [], []
        self.may, self.fails = threading.Event(), False
        self.may.set()

    def start(self):
        self.answerer.start(self.copy)
        self.answerer.note(PASS)

    def copy(self, request):
        self.asked.append(request)
        assert self.may.wait(10)
        if self.fails:
            raise OSError("the device is gone")
        self.copied.append(request)

    def close(self):
        self.answerer.stop()
        self.answerer.join()


@pytest.fixture
def ranks(engine_id):
    """They do not answer before they are started."""
    ranks = [Rank(engine_id, number) for number in range(2)]
    yield ranks
    for rank in ranks:
        rank.may.set()
        if rank.answerer._thread.is_alive():
            rank.close()


@pytest.fixture
def leader(engine_id, ranks):
    ranks[0].start()
    return Asker(engine_id, 2, ranks[0].answerer)


def ask_while(leader, call, held_s=0.1):
    """What the leader is told, which it is not before `call()`."""
    with futures.ThreadPoolExecutor(1) as threads:
        answer = threads.submit(leader.ask, 7, PASS)
        with pytest.raises(futures.TimeoutError):
            answer.result(held_s)
        call()
        return answer.result(10)


def until_asked(leader, number):
    """A rank that was late has still to say so."""
    deadline = time.monotonic() + 10
    while not leader.ask(8, number):
        assert time.monotonic() < deadline


def test_all_ranks_copy_what_they_are_asked_about(leader, ranks):
    ranks[1].start()
    for request in (7, 8, 1 << 63):
        assert leader.ask(request, PASS)
        assert [rank.copied[-1] for rank in ranks] == [request, request]
    assert [rank.copied for rank in ranks] == [[7, 8, 1 << 63]] * 2


@pytest.mark.parametrize("slow", [0, 1])
def test_each_is_waited_for(leader, ranks, slow):
    ranks[1].start()
    ranks[slow].may.clear()
    assert ask_while(leader, ranks[slow].may.set)
    assert [rank.copied for rank in ranks] == [[7], [7]]


def test_however_long_one_takes_that_has_begun(leader, ranks, monkeypatch):
    """As it reads blocks that would be another's."""
    monkeypatch.setattr(module, "BEGIN_S", 0.3)
    ranks[1].start()
    ranks[1].may.clear()
    assert ask_while(leader, ranks[1].may.set, held_s=0.6)


def test_and_until_it_knows_what_the_pass_stores(leader, ranks):
    """The leader may be ahead."""
    ranks[1].answerer.start(ranks[1].copy)
    ranks[1].answerer.note(PASS - 1)
    assert ask_while(leader, lambda: ranks[1].answerer.note(PASS))
    assert ranks[1].copied == [7]


def test_but_not_for_what_it_will_never_know(leader, ranks, monkeypatch):
    monkeypatch.setattr(module, "BEGIN_S", 0.3)
    ranks[1].answerer.start(ranks[1].copy)
    assert not leader.ask(7, PASS)
    monkeypatch.setattr(module, "BEGIN_S", 20)
    for rank in ranks:
        rank.answerer.note(PASS + 1)
    until_asked(leader, PASS + 1)
    assert ranks[1].asked == [8]


def test_nor_twice_for_the_same(leader, ranks, monkeypatch):
    monkeypatch.setattr(module, "BEGIN_S", 0.3)
    ranks[1].answerer.start(ranks[1].copy)
    assert not leader.ask(7, PASS)
    ranks[1].answerer.note(PASS)
    monkeypatch.setattr(module, "BEGIN_S", 20)
    began = time.monotonic()
    while leader._owing:
        assert not leader.ask(8, PASS)
    assert not leader.ask(8, PASS)
    assert time.monotonic() - began < 10
    assert 8 not in ranks[1].asked


def test_of_a_pass_that_failed_nobody_is_asked(leader, ranks, monkeypatch):
    monkeypatch.setattr(module, "BEGIN_S", 20)
    ranks[1].start()
    began = time.monotonic()
    assert not leader.ask(7, PASS + 1)
    assert time.monotonic() - began < 10
    assert leader.ask(8, PASS)
    assert [rank.asked for rank in ranks] == [[8], [8]]


def test_one_that_is_stuck_does_not_begin_later(leader, ranks, monkeypatch):
    monkeypatch.setattr(module, "BEGIN_S", 0.3)
    assert not leader.ask(7, PASS)
    ranks[1].start()
    ranks[1].close()
    assert (ranks[0].copied, ranks[1].asked) == ([7], [])


def test_nor_does_one_that_is_late_by_a_hair(leader, ranks, monkeypatch):
    """It has said that it begins, and finds that it must not."""
    monkeypatch.setattr(module, "BEGIN_S", 0.0)
    ranks[1].start()
    assert not leader.ask(7, PASS)
    for rank in ranks:
        rank.close()
        assert rank.asked == []


def test_one_that_is_stuck_is_waited_for_once(leader, ranks, monkeypatch):
    monkeypatch.setattr(module, "BEGIN_S", 0.3)
    assert not leader.ask(7, PASS)
    monkeypatch.setattr(module, "BEGIN_S", 20)
    ranks[0].answerer.note(PASS + 1)
    began = time.monotonic()
    assert not leader.ask(8, PASS + 1)
    assert time.monotonic() - began < 10
    assert ranks[0].asked == [7], "who could begin is not asked either"


def test_and_asked_again_when_it_goes_on(leader, ranks, monkeypatch):
    monkeypatch.setattr(module, "BEGIN_S", 0.3)
    assert not leader.ask(7, PASS)
    ranks[1].start()
    monkeypatch.setattr(module, "BEGIN_S", 20)
    for rank in ranks:
        rank.answerer.note(PASS + 1)
    until_asked(leader, PASS + 1)
    assert (ranks[0].copied, ranks[1].copied) == ([7, 8], [8])


@pytest.mark.parametrize("is_asked", [False, True])
def test_one_that_has_closed_is_not_waited_for(leader, ranks, is_asked):
    ranks[1].start()
    if is_asked:
        ranks[1].may.clear()
        ranks[1].answerer._copy = None  # it finds that when it is asked
        assert not leader.ask(7, PASS)
    else:
        ranks[1].close()
    assert not leader.ask(8, PASS)
    assert 8 not in ranks[0].asked


def test_it_closes_when_its_copy_is_made(leader, ranks):
    ranks[1].start()
    ranks[1].may.clear()
    closed = threading.Thread(target=ranks[1].close)

    def close():
        closed.start()
        closed.join(0.05)
        assert closed.is_alive()
        ranks[1].may.set()

    assert ask_while(leader, close)
    closed.join(10)
    assert ranks[1].copied == [7]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_of_a_rank_holds_up_nobody(leader, ranks):
    ranks[1].start()
    ranks[1].fails = True
    assert not leader.ask(7, PASS)
    assert ranks[1].copied == []


def test_a_rank_in_another_process(engine_id, ranks, monkeypatch):
    monkeypatch.setattr(module, "BEGIN_S", 60)  # it has to start
    ranks[0].start()
    leader = Asker(engine_id, 2, ranks[0].answerer)
    code = (
        "import sys; from lmcache.adapters.trtllm.asking import Answerer\n"
        "answerer = Answerer(sys.argv[1], 1)\n"
        "answerer.start(lambda request: print(request, flush=True))\n"
        "answerer.note(int(sys.argv[2])); sys.stdin.read(); answerer.stop(); answerer.join()"
    )
    command = [sys.executable, "-c", code, engine_id, str(PASS)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as child:
        assert leader.ask(1 << 40, PASS)
        said, _ = child.communicate("")
    assert said.split() == [str(1 << 40)]
    assert not leader.ask(8, PASS), "it has closed"


def test_nothing_is_left_of_it(engine_id, leader, ranks):
    for _ in range(2):
        remove_pipes(engine_id)
    assert not module._pipes_of(engine_id).exists()
    with pytest.raises(LayoutError, match="this rank cannot be asked by the leader: .*No such fi"):
        Answerer(engine_id, 0)
    ranks[1].start()
    assert leader.ask(7, PASS)


def test_it_is_ours_alone(engine_id):
    pipes = module._pipes_of(engine_id)
    assert stat.S_IMODE(pipes.stat().st_mode) == 0o700
    for pipe in pipes.iterdir():
        assert stat.S_IMODE(pipe.stat().st_mode) == 0o600


def test_a_name_is_used_once(engine_id):
    with pytest.raises(LayoutError, match="File exists"):
        make_pipes(engine_id, 1)


def test_where_there_can_be_none(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_pipes_of", lambda engine_id: Path(tmp_path, "none", engine_id))
    with pytest.raises(LayoutError, match="ranks cannot be asked: .*No such file"):
        make_pipes("one", 1)


def test_what_was_begun_is_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_pipes_of", lambda engine_id: tmp_path / engine_id)
    monkeypatch.setattr(module.os, "mkfifo", no_pipes)
    with pytest.raises(LayoutError, match="ranks cannot be asked: .*not permitted"):
        make_pipes("one", 1)
    remove_pipes("one")
    assert not list(tmp_path.iterdir())


def no_pipes(*_):
    raise PermissionError(1, "Operation not permitted")
