"""Jobs run on threads that nobody has to wait for."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import wait

import pytest

from lmcache.core.pool import DaemonPool


@pytest.fixture
def gate():
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def make_pool():
    made = []

    def make(threads):
        made.append(DaemonPool(threads, "pool"))
        return made[-1]

    yield make
    for pool in made:
        pool.close()
        pool.join()


def test_every_job_runs_once(make_pool):
    pool, done = make_pool(3), []
    for number in range(100):
        pool.submit(done.append, number)
    assert pool.wait(10)
    assert sorted(done) == list(range(100))
    assert len(pool) == 0


def test_what_was_waited_for_has_ended(gate):
    class Slow(DaemonPool):
        def _forget(self, future):
            gate.wait(10)
            super()._forget(future)

    pool = Slow(1, "pool")
    pool.submit(int)
    assert pool.wait(10)
    assert len(pool) == 0
    gate.set()
    pool.close()
    pool.join()


def test_as_many_at_once_as_there_are_threads(make_pool):
    together = threading.Barrier(3)
    pool = make_pool(3)
    for _ in range(3):
        pool.submit(together.wait, 10)
    assert pool.wait(10)
    assert not together.broken


def test_no_thread_before_there_is_a_job(make_pool):
    before = threading.active_count()
    pool = make_pool(8)
    assert threading.active_count() == before
    pool.submit(int)
    assert pool.wait(10)
    assert threading.active_count() == before + 1


def test_waiting_has_an_end(make_pool, gate):
    pool = make_pool(1)
    pool.submit(gate.wait)
    began = time.monotonic()
    assert not pool.wait(0.05)
    assert time.monotonic() - began < 5


def test_closing_cancels_what_has_not_begun(make_pool, gate):
    pool, ended = make_pool(1), []
    begun = threading.Event()
    first = pool.submit(lambda: (begun.set(), gate.wait()))
    others = [pool.submit(ended.append, 1) for _ in range(3)]
    assert begun.wait(10)
    pool.close()
    assert [job.cancelled() for job in others] == [True] * 3
    gate.set()
    first.result(10)
    pool.join()
    assert (ended, len(pool)) == ([], 0)


def test_who_waits_for_what_is_cancelled_is_told(make_pool, gate):
    pool = make_pool(1)
    pool.submit(gate.wait)
    job = pool.submit(gate.wait)
    waiter = threading.Thread(target=wait, args=([job],))
    waiter.start()
    pool.close()
    waiter.join(10)
    assert not waiter.is_alive()
    gate.set()


def test_a_job_that_no_thread_can_be_started_for_is_not_submitted(make_pool, monkeypatch):
    pool, done = make_pool(1), []

    def cannot(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", cannot)
        with pytest.raises(RuntimeError, match="can't start"):
            pool.submit(done.append, 1)
    assert len(pool) == 0
    pool.submit(done.append, 2)
    assert pool.wait(10)
    assert done == [2]


def test_a_closed_pool_takes_no_job(make_pool):
    pool = make_pool(1)
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(int)
    assert len(pool) == 0


def test_a_job_that_fails_is_logged_and_the_next_one_runs(make_pool, caplog):
    pool = make_pool(1)
    with caplog.at_level(logging.ERROR, "lmcache.core.pool"):
        bad, good = pool.submit(int, "seven"), pool.submit(int, "7")
        assert pool.wait(10)
    assert isinstance(bad.exception(), ValueError)
    assert good.exception() is None
    assert "invalid literal" in caplog.text


def run(script: str) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    return time.monotonic() - began


def test_a_job_that_hangs_does_not_keep_the_process():
    script = (
        "import time; from lmcache.core.pool import DaemonPool; "
        "DaemonPool(1, 'pool').submit(time.sleep, 50); time.sleep(0.2)"
    )
    assert run(script) < 30


def test_the_most_urgent_runs_first_then_who_came_first(make_pool, gate):
    pool, done = make_pool(1), []
    pool.submit(gate.wait)
    for name, order in (("c", (1.0, 0.0)), ("a", (0.0, 1.0)), ("d", (1.0, 0.0)), ("b", (0.0, 2.0))):
        pool.submit(done.append, name, order=order)
    gate.set()
    pool.wait()
    assert "".join(done) == "abcd"
