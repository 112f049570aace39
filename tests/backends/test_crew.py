from __future__ import annotations

import threading
import time

import pytest

from lmcache.backends.crew import Crew
from lmcache.core.errors import BackendError


@pytest.fixture
def new_crew():
    crews = []

    def new_crew(size):
        crews.append(Crew(size, "lmcache-crew"))
        return crews[-1]

    yield new_crew
    for crew in crews:
        crew.close()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_as_many_jobs_are_done_at_once_as_there_are_hands(new_crew, size):
    together = threading.Barrier(size)
    new_crew(size).do([lambda: together.wait(30)] * size)  # which breaks if one is missing


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_job_is_done_and_never_more_at_once(new_crew, size):
    begun, busy, most, lock = [], set(), [0], threading.Lock()

    def job(n):
        with lock:
            begun.append(n)
            busy.add(n)
            most[0] = max(most[0], len(busy))
        time.sleep(0.01)
        with lock:
            busy.remove(n)

    new_crew(size).do(lambda n=n: job(n) for n in range(20))
    assert sorted(begun) == list(range(20))
    assert most[0] <= size


def test_no_jobs_are_done_at_once(new_crew):
    new_crew(3).do([])


def test_while_all_helpers_are_busy_a_caller_does_its_jobs_itself(new_crew):
    crew, release, done = new_crew(2), threading.Event(), []
    other = threading.Thread(target=crew.do, args=([lambda: release.wait(30)] * 2,))
    other.start()
    try:
        crew.do([lambda n=n: done.append((n, threading.current_thread())) for n in range(3)])
    finally:
        release.set()
        other.join()
    assert done == [(n, threading.current_thread()) for n in range(3)]


def test_after_a_failure_no_job_begins_and_none_runs_any_more(new_crew):
    begun, ended = [], []

    def slow(n):
        begun.append(n)
        time.sleep(0.2)
        ended.append(n)

    def fail():
        time.sleep(0.05)
        raise BackendError("no")

    jobs = [fail, *(lambda n=n: slow(n) for n in range(100))]
    with pytest.raises(BackendError, match="no"):
        new_crew(4).do(jobs)
    assert sorted(ended) == sorted(begun)
    assert len(begun) <= 3


def test_once_closed_it_says_so(new_crew):
    crew = new_crew(2)
    crew.close()
    with pytest.raises(RuntimeError):
        crew.do([lambda: None] * 2)
