"""What an attachment gave a worker is let go of behind the engine when the attachment ends."""

from __future__ import annotations

import threading
import time

import pytest

from lmcache.core.mover import Mover


def wait_until(holds, timeout=10.0):
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Closing:
    """The end of a mover, once it may go on: pinned memory takes long to let go of."""

    def __init__(self, mover):
        self.mover, self.close = mover, mover.close
        self.go, self.begun, self.thread = threading.Event(), threading.Event(), ""
        mover.close = self

    def __call__(self):
        self.thread = threading.current_thread().name
        self.begun.set()
        assert self.go.wait(5)
        self.close()

    @property
    def is_mapped(self):
        return self.mover._slab.fd != -1


@pytest.fixture
def closing():
    """Of the movers of some engines."""
    made = []

    def of(engine):
        made.append(Closing(engine.ranks[0].mover))
        return made[-1]

    yield of
    for one in made:
        one.go.set()


def attach_anew(engine):
    earlier = engine.cache
    earlier.visits[0].close()  # the joining thread takes it for dead
    wait_until(lambda: engine.cache not in (None, earlier))


@pytest.mark.parametrize("where", ["host", "device"])
def test_no_step_waits_for_a_slab_to_be_let_go_of(make_engine, on_gpu, closing, where):
    engine = on_gpu("let go") if where == "device" else make_engine()
    old = closing(engine)
    engine.generate("cold", range(50))
    attach_anew(engine)
    assert old.begun.wait(5), "and none has to begin for it"
    assert engine.generate("cold again", range(50)) == 0
    engine.settle()
    assert engine.generate("warm again", range(50)) == 48
    assert old.is_mapped
    assert old.thread.startswith("lmcache-closing")
    old.go.set()
    wait_until(lambda: not old.is_mapped)
    engine.settle()
    engine.check_text()
    engine.check_idle()


def test_no_slab_is_unmapped_while_it_is_copied(on_gpu, closing):
    """A store behind the engine is under way when the attachment ends."""
    engine = on_gpu("under way")
    old = closing(engine)
    old.go.set()
    mover, inside, may_go_on = old.mover, threading.Event(), threading.Event()
    copy = mover._pages.copy

    def slow(spans, region, *, to_slab, after=None):
        inside.set()
        assert may_go_on.wait(5)
        assert old.is_mapped
        return copy(spans, region, to_slab=to_slab, after=after)

    mover._pages.copy = slow
    engine.add("a", range(48))
    engine.step()
    assert inside.wait(5)
    engine.cache.visits[0].close()
    assert not old.begun.wait(0.05)
    may_go_on.set()
    assert old.begun.wait(5)
    engine.run()
    engine.settle()
    engine.check_text()


def test_the_end_of_a_worker_waits_for_it(make_engine, closing):
    engine = make_engine()
    old = closing(engine)
    ending = threading.Thread(target=engine.ranks[0].impl.shutdown)
    ending.start()
    assert old.begun.wait(5)
    ending.join(0.05)
    assert ending.is_alive()
    old.go.set()
    ending.join(5)
    assert not old.is_mapped


def test_a_slab_that_cannot_be_let_go_of_is_told(make_engine, closing, lines):
    engine = make_engine()
    old = closing(engine)

    def fail():
        raise OSError("cuMemHostUnregister failed with 999")

    close, old.close = old.close, fail
    old.go.set()
    attach_anew(engine)
    wait_until(lambda: lines.about("a job of lmcache-closing failed"))
    assert engine.generate("cold", range(50)) == 0
    assert engine.generate("warm", range(50)) == 48
    assert engine.ranks[0].impl.errors == 0
    close()


def test_memory_for_a_copier_that_cannot_be_made_is_let_go_of(make_engine, monkeypatch, lines):
    slabs = []

    def fails(layout, slab, tensors, places):
        slabs.append(slab)
        raise RuntimeError("no memory for the buffers")

    monkeypatch.setattr("lmcache.core.grants.copier_for", fails)
    engine = make_engine()
    wait_until(lambda: lines.about("cannot use the slab"))
    engine.generate("cold", range(50))
    engine.check_text()
    wait_until(lambda: slabs[0].fd == -1)


def test_a_copier_that_is_too_slow_is_left_behind_between_two_steps(
    make_engine, make_house, monkeypatch
):
    house = make_house(modes=("engine_driven", "lmcache_driven"))
    engine = make_engine(house=house, extra={"lmcache.mp.mp_transfer_mode": "lmcache_driven"})
    engine.wait_attached()
    engine.generate("cold", range(50))
    house.wait_idle()
    may_go_on, load = threading.Event(), Mover.load

    def slow(mover, *arguments):
        assert may_go_on.wait(30)
        return load(mover, *arguments)

    monkeypatch.setattr(Mover, "load", slow)
    engine.add("warm", range(50))

    def has_ended():
        engine.step()
        return not engine.scheduler.requests

    try:
        wait_until(has_ended)
    finally:
        may_go_on.set()
    assert engine.runner.refused or any(engine.runner.invalid)
    engine.drain()
    engine.check_text()
