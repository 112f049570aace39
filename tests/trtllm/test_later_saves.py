"""No pass waits for our stores, and none of them counts that may have read another's blocks (F)."""

from __future__ import annotations

import importlib
import threading
import time
from types import SimpleNamespace

import pytest
from driver import Engine, prompt
from ours import in_process, with_server
from suite import queries

from lmcache.core.mover import Mover

UNTOLD = ["v1_2", "v1_3"]
AWAY = 6
"""Passes after which nobody waits for a request any more."""


def is_later():
    """Whether this is no store of a pool's trial."""
    return threading.current_thread().name.startswith("lmcache-stores")


class Slow:
    """Stores that begin when they may."""

    def __init__(self, monkeypatch):
        self.may = threading.Event()
        self.fails = False
        store = Mover.store

        def slow(mover, *args):
            if is_later():
                assert self.may.wait(20)
                if self.fails:
                    raise OSError("the device is gone")
            return store(mover, *args)

        monkeypatch.setattr(Mover, "store", slow)


@pytest.fixture
def slow(monkeypatch):
    slow = Slow(monkeypatch)
    yield slow
    slow.may.set()


@pytest.fixture(params=["in-process", "server"])
def start(request, profile, monkeypatch):
    if request.param == "server":
        plug = with_server(monkeypatch, request.getfixturevalue("server"))
    else:
        plug = in_process(monkeypatch)
    # what is forgotten need not be waited for here
    monkeypatch.setattr(importlib.import_module("lmcache.adapters.trtllm.stores"), "LOST_S", 60)
    return lambda **options: Engine(profile, plug, **options)


def polls(engine, rank=0):
    """Requests whose blocks are kept from now on, and those of which all is stored."""
    calls = engine.ranks[rank].manager.trace.of("get_finished")
    return [(call[1], call[3]) for call in calls]


def kept(engine):
    return sum(engine.ranks[0].memory.blocks[0].holders)


def run_others(engine, passes=AWAY):
    """So many passes, of a request that nothing is stored of."""
    engine.submit(prompt(10, seed=99), new_tokens=passes)
    engine.run()


def copies(engine):
    """Those that wait for a word about their requests, on all ranks."""
    stores = [rank.manager.worker._worker._stores for rank in engine.ranks]
    return [copy for each in stores for some in each._copies.values() for copy in some]


def is_tidy(engine):
    return not engine.leader._scheduler._storing._requests and not copies(engine)


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def look_up(engine, tokens):
    """What of a prompt is stored, and true."""
    engine.plug.settle()
    engine.forget()
    engine.submit(tokens)
    engine.run()
    return queries(engine)[-1][1]


def test_blocks_stay_until_all_is_stored(start, slow):
    with start(blocks=12) as engine:
        engine.hooks.polling = lambda executor: executor.memory.forget()
        request = engine.submit(prompt(128))
        engine.step(3)
        assert polls(engine) == [([request.id], []), ([], []), ([], [])]
        assert kept(engine) == 4
        engine.submit(prompt(10, seed=1), new_tokens=3)
        engine.step(3)
        assert engine.trace.count("finished") == 2, "others go on meanwhile"
        assert kept(engine) == 4
        slow.may.set()
        engine.run()
        assert [done for _, done in polls(engine) if request.id in done] == [[request.id]]
        assert kept(engine) == 0
        assert look_up(engine, prompt(128)) == 96
        engine.audit()


def test_what_is_stored_can_be_found_while_its_request_runs(start):
    with start() as engine:
        first = engine.submit(prompt(128), new_tokens=60)
        engine.step()
        until(lambda: all(copy.over_at for copy in copies(engine)))
        engine.step()
        engine.plug.settle()
        another = SimpleNamespace(
            request_id=5, lora_task_id=None, get_tokens=lambda beam: list(prompt(130))
        )
        assert engine.leader.get_num_new_matched_tokens(another, 0) == (128, False)
        engine.leader.request_finished(another, [])
        assert not first.is_finished
        engine.run()


@pytest.mark.parametrize("profile", UNTOLD, indirect=True)
def test_a_request_that_just_stays_away(start, slow):
    """Its blocks are another's before they are read."""
    with start(blocks=12) as engine:
        engine.hooks.polling = lambda executor: executor.memory.forget()
        request = engine.submit(prompt(128), new_tokens=9)
        engine.step()
        engine.cancel(request)
        engine.step()
        assert kept(engine) == 0
        slow.may.set()
        run_others(engine)
        assert is_tidy(engine)
        assert look_up(engine, prompt(128)) == 0
        engine.audit()


@pytest.mark.parametrize("profile", UNTOLD, indirect=True)
def test_nobody_waits_for_a_request_that_stays_away_from_an_idle_engine(start, slow, monkeypatch):
    stores = importlib.import_module("lmcache.adapters.trtllm.stores")
    monkeypatch.setattr(stores, "LOST_S", 0.2)
    with start() as engine:
        request = engine.submit(prompt(128), new_tokens=9)
        engine.step()
        engine.cancel(request)
        engine.step(2)
        slow.may.set()
        until(lambda: not copies(engine))
        assert look_up(engine, prompt(128)) == 0


@pytest.mark.parametrize("profile", ["v1_1", "main_v1", "main_v2"], indirect=True)
def test_a_cancelled_request_that_is_told_of_is_stored_to_its_end(start, slow):
    with start(blocks=12) as engine:
        engine.hooks.polling = lambda executor: executor.memory.forget()
        request = engine.submit(prompt(128), new_tokens=9)
        engine.step()
        engine.cancel(request)
        engine.step()
        assert kept(engine) == 5
        slow.may.set()
        engine.run()
        assert kept(engine) == 0
        assert look_up(engine, prompt(160)) == 128
        engine.audit()


@pytest.mark.parametrize("profile", ["main_v2"], indirect=True)
def test_a_request_that_begins_anew(start, slow):
    """What was read of the blocks it has lost does not count, and it is stored again."""
    with start(chunked=True, max_num_tokens=64, blocks=16) as engine:
        engine.hooks.polling = lambda executor: executor.memory.forget()
        request = engine.submit(prompt(200))
        engine.step()
        engine.reset(request)
        engine.step()
        slow.may.set()
        engine.run()
        run_others(engine)
        assert is_tidy(engine)
        engine.audit()


def test_a_store_that_fails(start, slow):
    slow.fails = True
    slow.may.set()
    with start() as engine:
        request = engine.submit(prompt(128), new_tokens=3)
        engine.run()
        assert [request.id] in [done for _, done in polls(engine)]
        slow.fails = False
        assert look_up(engine, prompt(128)) == 0
        assert look_up(engine, prompt(128)) == 96


def test_a_rank_that_is_slower_than_the_other(start, monkeypatch):
    may, store = threading.Event(), Mover.store

    def slow_on_one(mover, *args):
        assert mover._slice == 0 or not is_later() or may.wait(20)
        return store(mover, *args)

    monkeypatch.setattr(Mover, "store", slow_on_one)
    with start(ranks=2, layers=1) as engine:
        engine.submit(prompt(128))
        engine.step()
        until(lambda: engine.step() or any(d for r in (0, 1) for _, d in polls(engine, r)))
        assert kept(engine) == 4, "one of them still reads"
        may.set()
        engine.run()
        assert kept(engine) == 0
        assert look_up(engine, prompt(128)) == 96
        engine.audit()


def test_an_id_that_nothing_is_stored_of_is_reported_at_once(start):
    with start() as engine:
        request = engine.submit(prompt(10))
        engine.run()
        assert request.id not in [each for granted, _ in polls(engine) for each in granted]
        request = engine.submit(prompt(128), new_tokens=40)
        engine.step()
        until(lambda: engine.step() or not copies(engine))
        engine.run()
        assert polls(engine)[-1] == ([request.id], [request.id])


def test_passes_do_not_name_a_long_request_for_ever(start):
    with start() as engine:
        engine.submit(prompt(128), new_tokens=100)
        scheduler, steps = engine.leader._scheduler, []
        build = scheduler.build
        scheduler.build = lambda output: steps.append(build(output)) or steps[-1]
        engine.run()
        assert [bool(step and step.running) for step in steps[:100]] == [False] + [True] * 64 + [
            False
        ] * 35
