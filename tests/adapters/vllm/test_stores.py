"""Stores behind the engine: no step begins while one of them reads a page that it may write to."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from lmcache.core.mover import HOLE, Move


@pytest.fixture(autouse=True)
def vllm(rig):
    """What follows imports it."""


def copies(pages):
    from lmcache.adapters.vllm.step import Copy

    moves = [Move(0, 1, len(pages), 0, list(pages))]
    return [Copy("r", moves, len(pages), len(pages), len(pages))]


def step(*, loads=(), stores=(), **said):
    from lmcache.adapters.vllm.step import Step

    return Step(
        loads=copies(loads) if loads else [], stores=copies(stores) if stores else [], **said
    )


class Mover:
    """Stores as soon as it is let go."""

    def __init__(self):
        self.layout = SimpleNamespace(regions=(0, 1))
        self.go = threading.Event()
        self.stored = []

    def mark(self):
        """Of the calling thread: elsewhere a device's current stream is another one."""
        return threading.current_thread()

    def store(self, stored, region, after):
        assert after is threading.main_thread()
        assert self.go.wait(5)
        self.stored.append(region)
        return 1

    def publish(self, stored):
        self.stored.append("published")


@pytest.fixture
def mover():
    return Mover()


@pytest.fixture
def stores(mover):
    from lmcache.adapters.vllm.stores import Stores

    made = Stores(behind=True)
    yield made
    mover.go.set()
    made.close()


@pytest.fixture
def begun():
    """A thread that begins something, once it has had time to."""
    threads = []

    def begun(begin, at_hand):
        threads.append(threading.Thread(target=begin, args=(at_hand,)))
        threads[-1].start()
        threads[-1].join(0.05)
        return threads[-1]

    yield begun
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


WRITES = {
    "given out": {"fresh": [1]},
    "lost": {"lost": [1]},
    "loaded": {"loads": [4, 1]},
}
READS = {
    "nothing": {},
    "others": {"fresh": [4], "lost": [5], "loads": [6, HOLE]},
    "stored again": {"stores": [1]},
}


@pytest.mark.parametrize("said", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("by_layer", [False, True], ids=["whole", "a layer"])
def test_a_step_that_may_write_to_pages_waits_for_their_stores(
    stores, mover, begun, said, by_layer
):
    if by_layer:
        stores.layer(mover, step(stores=[0, 1]), 0)
    else:
        stores.rest(mover, copies([0, 1]), ended=lambda: None)
    thread = begun(stores.begin, step(**said))
    assert thread.is_alive()
    mover.go.set()
    thread.join(5)
    assert mover.stored[0] == (0 if by_layer else None)


@pytest.mark.parametrize("said", READS.values(), ids=READS)
def test_any_other_does_not(stores, mover, begun, said):
    stores.rest(mover, copies([0, 1]), ended=lambda: None)
    assert not begun(stores.begin, step(**said)).is_alive()
    assert not mover.stored
    mover.go.set()


def test_what_one_step_has_stored_is_not_said_of_the_next(stores, mover):
    """Its layer is stored late; no layer of the next step is, so the rest of it is all."""
    done = threading.Event()
    stores.begin(step(stores=[0]))
    stores.layer(mover, step(stores=[0]), 0)
    stores.begin(step(stores=[1]))
    stores.rest(mover, copies([1]), done.set)
    mover.go.set()
    assert done.wait(5)
    assert mover.stored == [0, None, "published"]


@pytest.mark.parametrize("too_often", [False, True])
def test_however_often_we_failed_the_pages_are_waited_for(stores, mover, begun, too_often):
    from lmcache.adapters.vllm.hooks import Hooks
    from lmcache.core.wall import TOLERATED

    def fail(at_hand):
        stores.begin(at_hand)
        raise RuntimeError("on purpose")

    hooks = Hooks()
    hooks._worker = SimpleNamespace(begin=fail)
    hooks.errors = errors = TOLERATED if too_often else 0
    stores.rest(mover, copies([0, 1]), ended=lambda: None)
    thread = begun(hooks.begin, step(fresh=[1]))
    assert thread.is_alive()
    mover.go.set()
    thread.join(5)
    assert hooks.errors == errors + 1
