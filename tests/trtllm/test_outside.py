"""Loads outside the batch: who is told of, when, and what is not there after all."""

from __future__ import annotations

import sys
import threading
import time

import pytest
import standin
from driver import Engine, prompt
from judge import ExecutorDied
from ours import fail_loads, with_server
from suite import polls, queries, reports

from lmcache.adapters.trtllm import outside as module
from lmcache.adapters.trtllm.outside import OutsideLoads
from lmcache.core.mover import Mover


@pytest.fixture
def loads():
    loads = OutsideLoads()
    yield loads
    loads.stop()
    loads.join()


@pytest.fixture
def gate():
    """Holds loads up until it is set."""
    gate = threading.Event()
    yield gate
    gate.set()


def test_an_end_is_told_once_and_not_before_it_was_asked_for(loads):
    loads.submit(7, lambda: None)
    loads._loads[7].result(10)
    assert loads.take_ended([], is_idle=False) == []
    assert loads.take_ended([7], is_idle=False) == [7]
    assert loads.take_ended([], is_idle=False) == []


def test_an_end_is_told_when_it_has_come(loads, gate):
    loads.submit(7, lambda: None)
    loads.submit(8, gate.wait)
    loads._loads[7].result(10)
    assert loads.take_ended([7, 8], is_idle=False) == [7]
    assert loads.take_ended([], is_idle=True) == []
    gate.set()
    loads._loads[8].result(10)
    assert loads.take_ended([], is_idle=False) == [8]


def test_who_is_idle_waits_for_a_load(loads, gate, monkeypatch):
    monkeypatch.setattr(module, "IDLE_S", 10)
    loads.submit(7, gate.wait)
    threading.Timer(0.05, gate.set).start()
    assert loads.take_ended([7], is_idle=True) == [7]


def test_what_failed_is_raised(loads):
    loads.submit(7, lambda: 1 / 0)
    assert loads._loads[7].exception(10)
    with pytest.raises(ZeroDivisionError):
        loads.take_ended([7], is_idle=True)
    assert loads.take_ended([], is_idle=False) == []


def test_a_load_that_never_began(loads):
    with pytest.raises(RuntimeError, match=r"\[7\] wait for loads that never began"):
        loads.take_ended([7], is_idle=False)


def test_nothing_is_over_at_once(loads, gate):
    loads.submit(8, gate.wait)
    loads.excuse([7])
    assert loads.take_ended([7, 8], is_idle=False) == [7]


def test_who_was_excused_need_not_be_named(loads):
    loads.excuse([7])
    assert loads.take_ended([], is_idle=True) == []
    with pytest.raises(RuntimeError, match="never began"):
        loads.take_ended([7], is_idle=False)


class TestWithAnEngine:
    @pytest.fixture(params=["main_v1", "main_v2"])
    def profile(self, request):
        with standin.installed(request.param) as profile:
            yield profile

    @pytest.fixture
    def engine(self, profile, monkeypatch, server):
        """Its cache has 128 tokens."""
        with Engine(profile, with_server(monkeypatch, server), ranks=2, layers=1) as engine:
            engine.submit(prompt(130))
            engine.run()
            engine.forget()
            engine.clear()
            yield engine

    @pytest.fixture
    def slow(self, gate, monkeypatch):
        """One rank's loads are held up."""
        load = Mover.load

        def slow_on_one(mover, *args):
            if mover._slice:
                gate.wait(10)
            return load(mover, *args)

        monkeypatch.setattr(Mover, "load", slow_on_one)
        return gate

    def test_nobody_runs_before_its_load_is_over_on_every_rank(self, engine, slow):
        engine.submit(prompt(100, seed=1), new_tokens=20)
        request = engine.submit(prompt(160))
        # more passes than a request may be unseen for, if nothing is known of its end
        engine.step(40)
        assert request.is_parked
        assert reports(engine, raw=True)[-1][:2] == ("cached", 1)
        slow.set()
        engine.run()
        assert reports(engine, raw=True)[-1] == ("new", 160, 5, 128, 32)
        assert [sum(len(poll[3]) for poll in polls(engine, rank)) for rank in range(2)] == [1, 1]
        engine.audit()

    def test_what_cannot_be_loaded_ends_all(self, engine, monkeypatch):
        fail_loads(monkeypatch, rank=1)
        engine.submit(prompt(130))
        with pytest.raises(ExecutorDied, match="get_finished: .*2 chunks that were promised"):
            engine.run()
        engine.abandon()

    def test_a_pass_that_cannot_be_planned_breaks_the_promise(self, engine):
        engine.leader._scheduler.build = lambda output: 1 / 0
        engine.submit(prompt(130))
        with pytest.raises(ExecutorDied, match="blocks were promised and are lost"):
            engine.run()
        engine.abandon()

    @pytest.mark.parametrize("waits", [True, False])
    def test_an_offer_of_which_nothing_is_wanted(self, main_v2, monkeypatch, server, waits):
        """It is not said whether its request waits for nothing then."""
        plug = with_server(monkeypatch, server)
        with Engine(main_v2, plug, waits_for_nothing=waits) as engine:
            engine.submit(prompt(130))
            engine.run()
            engine.forget()
            engine.submit(prompt(160), defer=1, use=0)
            engine.run()
            assert sum(len(poll[3]) for poll in polls(engine)) == waits
            assert reports(engine, raw=True)[-1] == ("new", 160, 5, 0, 160)
            engine.audit()

    @pytest.mark.parametrize("use", [0, 32, 64])
    def test_what_there_was_no_room_for_is_computed(self, main_v2, monkeypatch, server, use):
        """Nobody tells of that; the first report says from where the request computes."""
        plug = with_server(monkeypatch, server)
        options = {"tells_of_less": False, "waits_for_nothing": True}
        with Engine(main_v2, plug, **options) as engine:
            engine.submit(prompt(130))
            engine.run()
            engine.forget()
            engine.submit(prompt(160), use=use)
            engine.run()
            assert engine.trace.count("cancel_load") == 0
            assert reports(engine, raw=True)[-1] == ("new", 160, 5, use, 160 - use)
            engine.audit()

    @pytest.fixture
    def mortal(self, tmp_path):
        """A server of a test's own."""
        options = ("--l1-size-gb", "0.1", "--chunk-size", "64")
        server = sys.modules["served"].Server(tmp_path / "log", *options)
        yield server.start()
        server.stop()

    def test_a_server_that_ends_with_many_loads_to_make(self, profile, monkeypatch, mortal):
        """It would wait for one second; they take three."""
        plug = with_server(monkeypatch, mortal, settle=lambda: None)
        load = Mover.load

        def takes_long(*args):
            time.sleep(0.5)
            return load(*args)

        with Engine(profile, plug, layers=1) as engine:
            for seed in range(6):
                engine.submit(prompt(130, seed))
            engine.run()
            mortal.wait_idle()
            engine.forget()
            engine.clear()
            monkeypatch.setattr(Mover, "load", takes_long)
            for seed in range(6):
                engine.submit(prompt(130, seed))
            engine.step()
            mortal.send(15)
            engine.run(limit=10**6)
            assert [found for _, found in queries(engine)] == [128] * 6

    def test_what_follows_is_stored(self, engine):
        engine.submit(prompt(260))
        engine.run()
        assert queries(engine) == [(0, 128)]
        engine.forget()
        engine.submit(prompt(260))
        engine.run()
        assert queries(engine)[-1] == (0, 256)

    def test_a_request_that_waits_for_too_long_is_no_longer_stored(self, engine, slow):
        scheduler = engine.leader._scheduler
        request = engine.submit(prompt(260))
        engine.step()
        scheduler._tracked[request.id].since -= 1e6
        engine.submit(prompt(20, seed=1))
        engine.step()
        assert not scheduler._tracked
        slow.set()
        engine.run()
        assert reports(engine, raw=True)[-1] == ("new", 260, 9, 128, 132)
        engine.forget()
        engine.submit(prompt(260))
        engine.run()
        assert queries(engine)[-1] == (0, 128)
