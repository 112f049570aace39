"""Stores behind the engine: in order, and fenced."""

from __future__ import annotations

import threading
import time

import pytest

from lmcache.core.fence import Fence


@pytest.fixture
def fence():
    made = Fence()
    yield made
    made.close()


class Store:
    """Ends when it is told to."""

    def __init__(self, done, name):
        self.done, self.name = done, name
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        assert self.go.wait(5)
        self.done.append(self.name)


@pytest.fixture
def stores():
    done = []
    made = [Store(done, number) for number in range(3)]
    yield done, made
    for store in made:
        store.go.set()


def later(call):
    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.02)
    return thread


def test_the_engine_waits_for_the_last_store_of_a_page_only(fence, stores):
    done, (first, second, third) = stores
    fence.submit(first, [1, 2])
    fence.submit(second, [2, 3])
    fence.submit(third, [9])
    fence.wait_for([4, 5])
    assert done == []
    waiting = later(lambda: fence.wait_for([3, 4]))
    first.go.set()
    waiting.join(0.02)
    assert waiting.is_alive()
    second.go.set()
    waiting.join(5)
    assert done == [0, 1], "in their order, and nobody waits for the third"
    fence.wait_for([1, 2, 3])


def test_a_store_that_fails_holds_nothing_up(fence, stores, caplog):
    done, (store, *_) = stores
    store.go.set()

    def fail():
        raise OSError("lost")

    fence.submit(fail, [1])
    fence.submit(store, [2])
    fence.wait_for([1, 2])
    assert done == [0]
    assert "a job of lmcache-stores failed" in caplog.text


def test_closing_drops_what_has_not_begun(fence, stores):
    done, (first, second, _) = stores
    fence.submit(first, [1])
    fence.submit(second, [2])
    assert first.begun.wait(5)
    closing = later(fence.close)
    assert closing.is_alive()
    first.go.set()
    closing.join(4)
    assert not closing.is_alive()
    assert done == [0]


def test_what_is_over_is_forgotten(fence, stores):
    _, (first, second, _) = stores
    first.go.set()
    fence.submit(first, range(1000))
    fence.wait_for([5])
    fence._pool.wait()
    fence.submit(second, [1])
    assert len(fence._reader) == 1
    second.go.set()
