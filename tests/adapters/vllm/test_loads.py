"""Loads that a batch waits for: after what the engine has queued, and none outlives its step."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from lmcache.core.grants import Progress
from lmcache.core.mover import Move


@pytest.fixture(autouse=True)
def vllm(rig):
    """What follows imports it."""


class Mover:
    """Loads a region when it is let go; fails where it is told to."""

    def __init__(self, regions=3):
        self.layout = SimpleNamespace(regions=range(regions))
        self.go = [threading.Event() for _ in range(regions)]
        self.begun = [threading.Event() for _ in range(regions)]
        self.fails, self.marks, self.loaded = set(), 0, []

    def mark(self):
        self.marks += 1
        return (threading.current_thread(), self.marks)

    def load(self, moves, region, after):
        self.begun[region].set()
        assert self.go[region].wait(5)
        if region in self.fails:
            raise OSError("lost")
        self.loaded.append((region, after))
        return 1, []


@pytest.fixture
def mover():
    return Mover()


@pytest.fixture
def lost():
    return []


@pytest.fixture
def loads(mover, lost):
    from lmcache.adapters.vllm.loads import BatchLoads
    from lmcache.adapters.vllm.step import Copy, Step

    made = BatchLoads(lost.extend)
    made.begin(Step(loads=[Copy("r", [Move(0, 1, 2, 0, [4, 5])], 8, 8, 8)]), mover)
    yield made
    for gate in mover.go:
        gate.set()
    made.close()


def test_a_layer_that_nobody_loaded_ahead_comes_after_all_that_is_queued(loads, mover):
    for gate in mover.go:
        gate.set()
    loads.layer(1)
    loads.end()
    here = threading.current_thread()
    assert mover.loaded == [(1, (here, 1)), (0, (here, 2)), (2, (here, 3))]


def test_all_layers_ahead_come_after_what_was_queued_when_they_were_asked_for(loads, mover):
    loads.ahead()
    for gate in mover.go:
        gate.set()
    loads.end()
    assert mover.loaded == [(region, (threading.current_thread(), 1)) for region in range(3)]


@pytest.mark.parametrize("ends", ["end", "leave", "close"])
def test_however_a_step_ends_no_page_is_being_filled_any_more(loads, mover, lost, ends):
    """Pages of a load that failed are computed anew at once."""
    mover.fails = {0}
    loads.ahead()
    mover.go[0].set()
    assert mover.begun[1].wait(5)
    raised = []

    def finish():
        try:
            getattr(loads, ends)()
        except OSError as error:
            raised.append(error)

    ending = threading.Thread(target=finish)
    ending.start()
    ending.join(0.1)
    assert ending.is_alive()
    mover.go[1].set()
    ending.join(5)
    assert not ending.is_alive()
    assert [region for region, _ in mover.loaded] == [1]
    assert not mover.begun[2].is_set(), "what has not begun is dropped"
    assert bool(raised) is (ends == "end")
    assert lost == ([4, 5] if ends == "end" else [])


def test_a_load_outside_the_batch_comes_after_what_was_queued_when_it_was_asked_for(mover):
    from lmcache.adapters.vllm.outside import OutsideLoads
    from lmcache.adapters.vllm.step import Copy, Step

    seen, answered = [], threading.Event()

    def load(moves, region, after):
        seen.append((region, after))
        return 1, []

    mover.load = load
    outside = OutsideLoads()
    progress = Progress(lambda number: answered.set())
    progress.begin(7, 1)
    copy = Copy("r", [Move(0, 1, 2, 0, [4, 5])], 8, 8, 8)
    outside.submit(Step(number=7, loads=[copy]), mover, progress)
    assert answered.wait(5)
    outside.close()
    assert seen == [(None, (threading.current_thread(), 1))]
    assert outside.take_received() == {"r"}


def test_an_engine_with_nothing_else_to_do_waits_for_a_load_under_way(mover, monkeypatch):
    """Else it would keep the interpreter's lock from the thread that makes it."""
    from lmcache.adapters.vllm import outside as module
    from lmcache.adapters.vllm.step import Copy, Step

    go = threading.Event()
    mover.load = lambda moves, region, after: (1, []) if go.wait(5) else (0, [4, 5])
    outside = module.OutsideLoads()
    assert outside.take_received(is_idle=True) == set(), "there is nothing to wait for"
    copy = Copy("r", [Move(0, 1, 2, 0, [4, 5])], 8, 8, 8)
    progress = Progress(lambda number: None)
    progress.begin(7, 1)
    outside.submit(Step(number=7, loads=[copy]), mover, progress)
    assert outside.take_received(is_idle=True) == set(), "it does not wait for long"
    monkeypatch.setattr(module, "IDLE_S", 30)
    assert outside.take_received() == set(), "who has something to do does not wait"
    threading.Timer(0.05, go.set).start()
    assert outside.take_received(is_idle=True) == {"r"}
    outside.close()


def test_vllm_is_idle_if_it_computes_nothing(make_engine, make_house):
    engine = make_engine(house=make_house(64 * 8192), pages=100)
    engine.wait_attached()
    seen, begin = [], engine.ranks[0].impl._worker.begin
    engine.ranks[0].impl._worker.begin = lambda step: seen.append(step.is_idle) or begin(step)
    engine.generate("cold", range(64))
    assert seen[0] is False
    seen.clear()
    engine.generate("warm", range(64))
    assert seen[0] is True
    assert False in seen
    engine.check_text()
