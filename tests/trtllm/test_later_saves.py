"""No pass waits for its own stores, and none of them counts that may have read another's blocks."""

from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace

import pytest
from driver import Engine, prompt
from judge import BatchFailed, Violation
from ours import in_process, with_server
from suite import polls, queries

from lmcache.adapters.trtllm.asking import Asker
from lmcache.adapters.trtllm.meeting import engine_id_for
from lmcache.core.mover import Mover
from lmcache.core.wall import TOLERATED

FIRST = 7_000_001
"""The first request of an engine."""
AWAY = 6
"""Passes after which nobody waits for a request any more."""


def is_later():
    """Whether this is no store of a pool's trial."""
    return threading.current_thread().name.startswith("lmcache-stores")


class Slow:
    """Stores that begin when they may."""

    def __init__(self, monkeypatch):
        self.may, self.begun = threading.Event(), threading.Event()
        self.fails = False
        store = Mover.store

        def slow(mover, *args):
            if is_later():
                self.begun.set()
                assert self.may.wait(20)
                if self.fails:
                    raise OSError("the device is gone")
            return store(mover, *args)

        monkeypatch.setattr(Mover, "store", slow)

    def holds_up(self, call):
        """Have something done that has to wait for stores, which then may begin."""
        running = threading.Thread(target=call)
        running.start()
        running.join(0.1)
        assert running.is_alive()
        self.may.set()
        running.join(20)
        assert not running.is_alive()


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
    return lambda **options: Engine(profile, plug, **options)


def kept(engine):
    """Blocks that requests have, or that are kept for them."""
    return sum(engine.ranks[0].memory.blocks[0].holders)


def run_others(engine, passes=AWAY):
    """So many passes, of a request that nothing is stored of."""
    engine.submit(prompt(10, seed=99), new_tokens=passes)
    engine.run()


def copies(engine):
    """Those that wait for a word about their requests, on all ranks."""
    return [c for rank in engine.ranks for c in rank.manager.worker._worker._stores._copies]


def is_tidy(engine):
    return not engine.leader._scheduler._storing._requests and not copies(engine)


def look_up(engine, tokens):
    """What of a prompt is stored, and true."""
    engine.plug.settle()
    engine.forget()
    engine.submit(tokens)
    engine.run()
    return queries(engine)[-1][1]


def native(request_id, tokens):
    about = {"request_id": request_id, "lora_task_id": None}
    return SimpleNamespace(get_tokens=lambda beam: list(tokens), **about)


def test_no_pass_waits_for_its_own_stores(start, slow):
    with start() as engine:
        engine.submit(prompt(128), new_tokens=3)
        engine.step()
        assert engine.trace.count("save") == 1
        assert copies(engine)
        slow.may.set()
        engine.run()
        assert look_up(engine, prompt(130)) == 128
        engine.audit()


def test_the_next_pass_waits_for_them(start, slow):
    """So that they do not pile up, and so that they count before its request may end."""
    with start() as engine:
        engine.submit(prompt(128), new_tokens=2)
        engine.step()
        slow.holds_up(engine.step)
        assert not copies(engine)
        engine.run()
        assert look_up(engine, prompt(130)) == 128
        engine.audit()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("new_tokens", [1, 2, 3])
def test_what_its_last_pass_has_computed_is_stored(start, new_tokens, overlap):
    with start(overlap=overlap, blocks=12) as engine:
        engine.hooks.polling = lambda executor: executor.memory.forget()
        engine.submit(prompt(128), new_tokens=new_tokens)
        engine.run()
        assert look_up(engine, prompt(130)) == 128
        engine.audit()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("new_tokens", [4, 5, 6, 7])
def test_what_it_has_generated_is_stored(start, monkeypatch, new_tokens, overlap):
    monkeypatch.setenv("LMCACHE_SAVE_DECODE_CACHE", "True")
    with start(overlap=overlap, blocks=12) as engine:
        engine.hooks.polling = lambda executor: executor.memory.forget()
        request = engine.submit(prompt(124), new_tokens=new_tokens)
        engine.run()
        # of the last token nothing has been computed, and of the one before no pass may be told
        told = 128 if new_tokens >= 5 + overlap else 64
        assert look_up(engine, (*request.tokens, 1, 2, 3, 4, 5)) >= told
        engine.audit()


def test_of_a_request_that_is_cancelled_what_was_computed_is_stored(start):
    with start(blocks=12) as engine:
        engine.hooks.polling = lambda executor: executor.memory.forget()
        request = engine.submit(prompt(128), new_tokens=9)
        engine.step()
        engine.cancel(request)
        engine.run()
        assert look_up(engine, prompt(130)) == 128
        engine.audit()


def test_what_is_stored_can_be_found_while_its_request_runs(start):
    with start() as engine:
        first = engine.submit(prompt(128), new_tokens=60)
        engine.step(2)
        engine.plug.settle()
        assert engine.leader.get_num_new_matched_tokens(native(5, prompt(130)), 0)[0] == 128
        engine.leader.request_finished(native(5, ()), [])
        assert not first.is_finished
        engine.run()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("passes", [0, AWAY])
def test_a_request_that_ends_before_it_is_stored(start, slow, overlap, passes):
    """Cancelled, told of or not; its blocks are another's before they are read."""
    with start(blocks=12, overlap=overlap) as engine:
        engine.hooks.polling = lambda executor: executor.memory.forget()
        request = engine.submit(prompt(128), new_tokens=9)
        engine.step()
        engine.cancel(request)
        others = threading.Thread(target=run_others, args=(engine, 3))
        others.start()
        others.join(0.1)
        slow.may.set()
        others.join(20)
        run_others(engine, passes) if passes else engine.step()
        run_others(engine)
        assert is_tidy(engine)
        engine.audit()


@pytest.mark.parametrize("profile", ["v1_1", "v1_2", "v1_3", "main_v1"], indirect=True)
class TestBlocksThatGo:
    """Version 1 keeps what holds the same, so a request's own are read before it has ended."""

    @pytest.mark.parametrize("ranks", [1, 2])
    @pytest.mark.parametrize("overlap", [False, True])
    def test_are_read_before_their_request_has_ended(self, start, slow, profile, ranks, overlap):
        with start(blocks=12, ranks=ranks, overlap=overlap) as engine:
            engine.hooks.polling = lambda executor: executor.memory.forget()
            engine.submit(prompt(128), new_tokens=1)
            engine.step(1 if overlap else 0)
            last = threading.Thread(target=engine.step)
            last.start()
            last.join(0.1)
            assert last.is_alive()
            assert engine.trace.count("finished") == 0
            slow.may.set()
            last.join(20)
            if overlap and profile.surplus_forward:
                assert polls(engine)[-1] == ([], [], [], [])  # the pass too many has waited
            else:
                assert polls(engine)[-1] == ([FIRST], [], [FIRST], [])
            assert engine.trace.count("finished") == 1
            assert is_tidy(engine)
            assert look_up(engine, prompt(130)) == 128
            engine.audit()
            assert kept(engine) == 0

    @pytest.mark.parametrize("late", [0, 1])
    def test_as_those_that_are_kept_may_be_another_requests(self, start, monkeypatch, late):
        """On every rank, however late it is."""
        store = Mover.store

        def slow_on_one(mover, *args):
            if is_later() and mover._slice == late:
                time.sleep(0.1)
            return store(mover, *args)

        monkeypatch.setattr(Mover, "store", slow_on_one)
        with start(blocks=12, ranks=2) as engine:
            engine.hooks.polling = lambda executor: executor.memory.forget()
            engine.submit(prompt(120), new_tokens=20)
            engine.submit(prompt(128), new_tokens=1)
            engine.run()
            assert any(FIRST + 7919 in named for named, *_ in polls(engine))
            assert look_up(engine, prompt(130)) == 128
            engine.audit()

    def test_what_is_read_too_late_is_seen(self, start, slow):
        """The look at each read finds what it is there for."""
        with start(blocks=12) as engine:
            engine.leader._scheduler._asker = lambda: SimpleNamespace(ask=lambda *pass_: True)
            engine.submit(prompt(120), new_tokens=20)
            engine.submit(prompt(128), new_tokens=1)
            engine.step()
            engine.abandon()
            slow.may.set()
            with pytest.raises(Violation, match="read: .* are nobody's"):
                engine.run()

    def test_or_never_if_a_rank_is_stuck(self, start, monkeypatch):
        may = threading.Event()
        with start(blocks=12, ranks=2) as engine:
            asking = sys.modules[Asker.__module__]
            answer = asking.Answerer._answer

            def late(answerer, *question):
                assert answerer._rank == 0 or may.wait(20)
                answer(answerer, *question)

            monkeypatch.setattr(asking.Answerer, "_answer", late)
            monkeypatch.setattr(asking, "BEGIN_S", 0.05)
            engine.hooks.polling = lambda executor: executor.memory.forget()
            engine.submit(prompt(128), new_tokens=1)
            engine.step()
            assert polls(engine)[-1] == ([], [], [], [])
            assert kept(engine) == 0
            monkeypatch.setattr(asking, "BEGIN_S", 20)
            may.set()
            run_others(engine)
            assert is_tidy(engine)
            assert look_up(engine, prompt(130)) == 0
            assert look_up(engine, prompt(130)) == 128
            engine.audit()

    @pytest.mark.parametrize("rank", [0, 1])
    def test_and_not_those_of_a_rank_that_has_given_up(self, start, rank):
        """The other one's are read, and do not count."""
        with start(blocks=12, ranks=2) as engine:
            engine.ranks[rank].manager.worker.errors = TOLERATED
            for seed in range(3):
                engine.submit(prompt(128, seed), new_tokens=1)
                engine.run()
            [asker] = sys.modules[engine_id_for.__module__].ASKERS.values()
            assert not asker._owing, "nobody has waited in vain"
            assert look_up(engine, prompt(130)) == 0
            engine.audit()

    def test_of_any_number_of_requests(self, start):
        with start(max_num_tokens=600) as engine:
            for seed in range(4):
                engine.submit(prompt(128, seed), new_tokens=1)
            engine.run()
            stored = [request for poll in polls(engine) for request in poll[2]]
            assert sorted(stored) == [FIRST + 7919 * n for n in range(4)]
            assert kept(engine) == 0
            for seed in range(4):
                assert look_up(engine, prompt(130, seed)) == 128
            engine.audit()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_is_read_when_a_pass_fails(start, slow, ranks, overlap):
    """Not even what the pass before has computed: its blocks go without a word."""
    with start(blocks=12, ranks=ranks, overlap=overlap) as engine:
        engine.submit(prompt(128), new_tokens=3)
        engine.step()
        for rank in engine.ranks:
            rank.model._launch = breaks_off
        engine.step()
        for rank in engine.ranks:
            del rank.model._launch
        run_others(engine)
        assert is_tidy(engine)
        assert not slow.begun.is_set()
        slow.may.set()
        assert look_up(engine, prompt(130)) == 0
        engine.audit()


def breaks_off(batch):
    raise BatchFailed("a kernel has failed")


@pytest.mark.parametrize("profile", ["main_v2"], indirect=True)
class TestBlocksThatStay:
    """Version 2 keeps those of a request that has ended, so that no pass waits for its stores."""

    @pytest.mark.parametrize("ranks", [1, 2])
    @pytest.mark.parametrize("overlap", [False, True])
    def test_until_they_are_stored(self, start, slow, ranks, overlap):
        with start(blocks=12, ranks=ranks, overlap=overlap) as engine:
            engine.hooks.polling = lambda executor: executor.memory.forget()
            engine.submit(prompt(128), new_tokens=1)
            engine.step(1 + overlap)
            assert polls(engine)[-1] == ([FIRST], [], [], [])
            engine.step(3)
            assert polls(engine)[-1] == ([], [], [], [])
            assert kept(engine) == 4
            slow.may.set()
            engine.step_until(lambda: polls(engine)[-1][2])
            assert polls(engine)[-1] == ([], [], [FIRST], [])
            assert engine.trace.count("finished") == 1
            engine.step_until(lambda: is_tidy(engine))  # the other rank may be slower
            assert look_up(engine, prompt(130)) == 128
            engine.audit()
            assert kept(engine) == 0

    def test_and_go_if_the_store_fails(self, start, slow):
        slow.fails = True
        slow.may.set()
        with start(blocks=12) as engine:
            engine.submit(prompt(128), new_tokens=1)
            engine.step_until(lambda: engine.trace.count("get_finished") and polls(engine)[-1][2])
            assert polls(engine)[-1][2] == [FIRST]
            assert kept(engine) == 0
            slow.fails = False
            assert look_up(engine, prompt(130)) == 0
            engine.audit()

    def test_but_not_those_of_which_all_is_stored(self, start):
        with start() as engine:
            engine.submit(prompt(128), new_tokens=4)
            engine.run()
            assert all(poll == ([], [], [], []) for poll in polls(engine))
            engine.audit()


@pytest.mark.parametrize("profile", ["main_v2"], indirect=True)
def test_a_request_that_begins_anew(start, slow):
    """What was read of the blocks it has lost does not count."""
    with start(chunked=True, max_num_tokens=64, blocks=16) as engine:
        engine.hooks.polling = lambda executor: executor.memory.forget()
        request = engine.submit(prompt(200))
        engine.step()
        engine.reset(request)
        running = threading.Thread(target=engine.run)
        running.start()
        running.join(0.1)
        slow.may.set()
        running.join(20)
        run_others(engine)
        assert is_tidy(engine)
        engine.audit()


def test_a_prefill_that_waits_for_its_turn_is_stored_again(start):
    """After so long nobody knows what has become of its blocks."""
    with start(chunked=True, max_num_tokens=64) as engine:
        engine.submit(prompt(200))
        engine.step()
        for _ in range(AWAY):
            others = SimpleNamespace(new_requests=[], cached_requests=[])
            engine.ranks[0].manager.worker.bind_connector_meta(
                engine.leader.build_connector_meta(others)
            )
            engine.dummy_pass()
        assert is_tidy(engine)
        engine.run()
        assert look_up(engine, prompt(201)) == 192
        engine.audit()


def test_a_step_that_is_not_sent(start, monkeypatch):
    """What it was to say is said with the next."""
    with start() as engine:
        engine.submit(prompt(128), new_tokens=4)
        engine.step()
        step = sys.modules[type(engine.leader._scheduler).__module__].Draft
        with monkeypatch.context() as broken:
            broken.setattr(step, "depart", lambda draft: 1 / 0)
            engine.step()
        assert copies(engine)
        engine.step()
        assert is_tidy(engine)
        engine.run()
        assert look_up(engine, prompt(130)) == 0
        engine.audit()


def test_a_store_that_fails(start, slow):
    slow.fails = True
    slow.may.set()
    with start() as engine:
        engine.submit(prompt(128), new_tokens=3)
        engine.run()
        slow.fails = False
        assert look_up(engine, prompt(128)) == 0
        assert look_up(engine, prompt(128)) == 96


def test_a_rank_that_is_slower_than_the_other(start, monkeypatch):
    store = Mover.store

    def slow_on_one(mover, *args):
        if is_later() and mover._slice == 1:
            time.sleep(0.05)
        return store(mover, *args)

    monkeypatch.setattr(Mover, "store", slow_on_one)
    with start(ranks=2, layers=1) as engine:
        for seed in range(3):
            engine.submit(prompt(128, seed), new_tokens=2)
            engine.run()
            assert look_up(engine, prompt(128, seed)) == 96
        engine.audit()


def test_passes_name_a_request_once_for_each_store(start):
    with start() as engine:
        engine.submit(prompt(128), new_tokens=20)
        scheduler, steps = engine.leader._scheduler, []
        build = scheduler.build
        scheduler.build = lambda output: steps.append(build(output)) or steps[-1]
        engine.run()
        assert [bool(step and step.running) for step in steps[:9]] == [False, True] + [False] * 7
