"""Workers that are missing, late, silent or dead: vLLM schedules on, and the cache comes back."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time

import pytest

from lmcache.core.handover import address_of

MOST_S = 0.02
"""No hook may keep vLLM's scheduler longer than this."""

WORKER = """
import sys, time
from lmcache.core.handover import Door, Hello, address_of
from lmcache.core.slab import MOVER_BYTES, Slab

engine_id, number, page_tokens, page_bytes, summary, slice_index = sys.argv[1:]
slabs = []

def granted(grant, fds):
    [fd] = fds
    slab = Slab(fd, grant.slab_bytes)
    slab.write_word(int(number) * MOVER_BYTES, 1 << 40)  # done with whatever will be asked for
    slabs.append(slab)

hello = Hello(
    number=int(number), page_tokens=int(page_tokens), page_bytes=int(page_bytes),
    summary=summary, slice_index=int(slice_index), pid=0,
)
Door(address_of(engine_id, int(number)), hello, granted, lambda: None)
print("listening", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start_worker():
    """Starts the second worker of an engine in a process of its own; it copies nothing."""
    started = []

    def start(engine):
        layout = engine.ranks[0].side.grants.layout
        arguments = [
            engine.config.kv_transfer_config.engine_id,
            1,
            layout.page_tokens,
            layout.page_bytes,
            layout.summary,
            0,
        ]
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(worker)
        assert worker.stdout.readline() == b"listening\n"
        return worker

    yield start
    for worker in started:
        worker.kill()
        worker.wait()
        worker.stdin.close()
        worker.stdout.close()


@pytest.fixture
def timed():
    """Wraps the scheduling hooks of an engine; how long each call took."""

    def wrap(engine):
        spent = []
        for name in (
            "get_num_new_matched_tokens",
            "update_state_after_alloc",
            "build_connector_meta",
            "request_finished",
        ):
            setattr(engine.impl, name, stopwatch(getattr(engine.impl, name), spent))
        return spent

    return wrap


def stopwatch(hook, spent):
    def call(*arguments):
        started = time.perf_counter()
        try:
            return hook(*arguments)
        finally:
            spent.append(time.perf_counter() - started)

    return call


def serve_without_a_cache(engine, spent, prefix):
    for number in range(5):
        assert engine.generate(f"{prefix}{number}", range(40), max_tokens=5) == 0
    assert len(spent) > 40
    # the machine may be busy with something else for a call or two
    assert statistics.quantiles(spent, n=20)[-1] < MOST_S
    engine.check_text()


def test_a_missing_worker_is_not_waited_for(make_engine, timed, lines):
    engine = make_engine(with_workers=False)
    spent = timed(engine)
    assert engine.cache is None
    serve_without_a_cache(engine, spent, "")
    assert len(lines.about("serving without a cache")) == 1
    assert not engine.side._tracked
    engine.check_idle()


def test_a_late_worker_is_found(make_engine, timed):
    engine = make_engine(with_workers=False)
    serve_without_a_cache(engine, timed(engine), "early")
    engine.start_workers()
    engine.wait_attached()
    assert engine.generate("cold", range(40)) == 0
    assert engine.generate("warm", range(40)) == 39
    engine.check_text()
    engine.check_idle()


def test_requests_from_before_the_worker_was_found_are_left_alone(make_engine):
    engine = make_engine(with_workers=False)
    engine.add("running", range(60), max_tokens=30)
    engine.step()
    engine.start_workers()
    engine.wait_attached()
    # its pages were computed before this fake had pages: nothing of it may be stored
    engine.abort("running")
    assert engine.generate("cold", range(60)) == 0
    assert engine.generate("warm", range(60)) == 59
    engine.check_text("cold", "warm")
    engine.check_idle()


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_a_silent_worker_is_not_waited_for(make_engine, timed):
    engine_id = f"silent-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(address_of(engine_id, 0))
        silent.listen(1)
        engine = make_engine(engine_id=engine_id, with_workers=False)
        serve_without_a_cache(engine, timed(engine), "")
    engine.start_workers()
    engine.wait_attached()
    assert engine.generate("cold", range(40)) == 0
    assert engine.generate("warm", range(40)) == 39
    engine.check_text()
    engine.check_idle()


def make_half(make_engine, start_worker):
    """An engine of two ranks with the same latents, the second of which is elsewhere."""
    engine = make_engine(ranks=2, mla=True, only_rank=0)
    worker = start_worker(engine)
    engine.wait_attached()
    return engine, worker


def test_a_worker_that_dies_takes_the_cache_with_it(make_engine, start_worker, timed):
    engine, worker = make_half(make_engine, start_worker)
    assert engine.generate("cold", range(60)) == 0
    assert engine.generate("warm", range(60)) == 59
    engine.add("running", range(100, 160), max_tokens=50)
    engine.step()
    worker.kill()
    engine.wait_attached(attached=False)
    spent = timed(engine)
    engine.run()
    serve_without_a_cache(engine, spent, "without")
    assert engine.impl.errors == 0
    assert engine.ranks[0].impl.errors == 0


def test_a_promise_to_load_is_kept_or_taken_back(make_engine, start_worker):
    engine, worker = make_half(make_engine, start_worker)
    engine.generate("cold", range(60))
    update = engine.impl.update_state_after_alloc

    def die(request, count):
        update(request, count)
        worker.kill()
        engine.wait_attached(attached=False)

    engine.impl.update_state_after_alloc = die
    engine.add("warm", range(80), max_tokens=3)
    engine.step()
    engine.impl.update_state_after_alloc = update
    assert len(engine.runner.invalid[-1]) == 15
    engine.run()
    engine.check_text()
    assert not engine.side._promises


def test_a_worker_that_comes_back_brings_a_new_cache(make_engine, start_worker):
    engine, worker = make_half(make_engine, start_worker)
    engine.generate("cold", range(60))
    worker.kill()
    engine.wait_attached(attached=False)
    assert engine.generate("without", range(60)) == 0
    start_worker(engine)
    engine.wait_attached()
    assert engine.generate("cold again", range(60)) == 0
    assert engine.generate("warm again", range(60)) == 59
    engine.check_text()
    engine.check_idle()


def test_a_step_planned_for_an_earlier_attachment_touches_nothing(engine):
    engine.generate("cold", range(60))
    engine.add("warm", range(80), max_tokens=3)
    engine.add("other", range(100, 160), max_tokens=3)
    planned = engine.schedule()
    step = planned.kv_connector_metadata
    assert step.loads
    assert step.stores
    earlier = engine.cache
    earlier.visits[0].close()  # the joining thread takes it for dead, and attaches anew
    deadline = time.monotonic() + 10
    while engine.cache in (None, earlier):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    slab = engine.cache.decider.slab.view
    assert not any(slab)
    engine.complete(planned)
    assert not any(slab)
    assert engine.runner.invalid[-1] == {page for move in step.all_loads() for page in move.pages}
    engine.run()
    assert engine.generate("cold again", range(60)) == 0
    assert engine.generate("warm again", range(60)) == 59
    engine.check_text()
    engine.check_idle()


def test_workers_that_cannot_share_are_refused(make_engine, start_worker, lines):
    engine = make_engine(ranks=2, only_rank=0)
    start_worker(engine)  # says that it holds the first rank's slice
    deadline = time.monotonic() + 10
    while not lines.about("serving without a cache"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert engine.cache is None
    assert engine.generate("a", range(40)) == 0
    engine.check_text()
