"""Prompts of which memory holds a quarter: they are loaded from a slower tier, part after part."""

from __future__ import annotations

import threading

import pytest

from lmcache.backends.memory import MemoryBackend
from lmcache.testing.faults import Wrapper

CHUNK, SLOT = 16, 8192
LENGTH = 240
PROMPT = range(LENGTH)
CHUNKS = LENGTH // CHUNK


class Shelf(Wrapper):
    """A backend that outlives its servers, and reads only what its gate lets through."""

    def __init__(self):
        super().__init__(MemoryBackend(max_size=1 << 24))
        self.read = 0
        self.gate = threading.Semaphore(1 << 20)

    def get_into(self, key, out):
        assert self.gate.acquire(timeout=30)
        size = super().get_into(key, out)
        self.read += size is not None
        return size

    def close(self):
        pass

    @property
    def objects(self):
        return self.backend._objects


def written(house):
    """Return when all that was stored is in the tier."""
    house.wait_idle()
    house.server.service.tiers.flush()


@pytest.fixture
def shelf(make_engine, make_house):
    """Holds the prompt, chunk by chunk."""
    made = Shelf()
    house = make_house(64 * SLOT, made)
    engine = make_engine(house=house, pages=100)
    engine.wait_attached()
    engine.generate("cold", PROMPT)
    written(house)
    assert len(made.objects) == CHUNKS
    yield made
    made.gate.release(1 << 20)


@pytest.fixture
def small(make_engine, make_house, shelf):
    """Makes an engine of a server that has room for a few chunks."""

    def make(slots=4, house=None, **options):
        modes = ("engine_driven", "lmcache_driven")
        house = make_house(slots * SLOT, shelf, modes=modes, **(house or {}))
        engine = make_engine(house=house, **{"pages": 200, **options})
        engine.wait_attached()
        return engine

    return make


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 8, 15])
def test_a_prompt_larger_than_memory_is_loaded_whole(small, shelf, slots):
    engine = small(slots)
    assert engine.generate("warm", PROMPT) == LENGTH
    assert shelf.read == CHUNKS
    assert not any(engine.runner.invalid)
    engine.check_text()
    engine.check_idle()


@pytest.mark.parametrize(
    "options",
    [
        {"ranks": 2},
        {"asynchronous": True},
        {"extra": {"lmcache.mp.mp_transfer_mode": "lmcache_driven"}},
        {"prefix_caching": True},
    ],
    ids=["two ranks", "ahead", "lending", "prefix caching"],
)
def test_with_every_way_to_load(make_engine, make_house, options):
    backend = Shelf()
    for number, slots in enumerate((64, 4)):
        modes = ("engine_driven", "lmcache_driven")
        house = make_house(slots * SLOT, backend, modes=modes)
        engine = make_engine(house=house, pages=200, **options)
        engine.wait_attached()
        assert engine.generate(str(number), PROMPT, max_tokens=3) == LENGTH * number
        written(house)
        engine.check_text()
        engine.check_idle()


def test_what_vllm_has_is_not_loaded_again(small, shelf):
    """Its own prefix cache reaches into the windows, or beyond some of them."""
    engine = small(prefix_caching=True)
    engine.generate("start", range(100))
    assert engine.generate("warm", PROMPT) == LENGTH - 100
    engine.check_text()
    engine.check_idle()


def test_a_tail_is_part_of_it(small, shelf, make_engine, make_house):
    house = make_house(64 * SLOT, shelf)
    engine = make_engine(house=house, pages=100)
    engine.wait_attached()
    engine.generate("cold", range(246))
    written(house)
    engine = small()
    assert engine.generate("warm", range(246)) == 244
    engine.check_text()
    engine.check_idle()


def test_no_window_reaches_beyond_what_was_promised(make_engine, make_house, small, shelf):
    """A tier has a tail behind it, which the first lookup never came to."""
    house = make_house(64 * SLOT, shelf)
    engine = make_engine(house=house, pages=100)
    engine.wait_attached()
    engine.generate("cold", range(LENGTH + 4))
    written(house)
    shelf.read = 0
    engine = small()
    assert engine.generate("warm", [*range(LENGTH + 4), *range(8)]) == LENGTH
    assert shelf.read == CHUNKS
    engine.check_text()
    engine.check_idle()


def test_windows_end_where_chunks_do(small, shelf):
    """Though memory has a tail that another prompt left in the place of the next chunk."""
    engine = small()
    cache = engine.cache
    engine.generate("short", range(3 * CHUNK + 8))
    assert engine.generate("warm", PROMPT) == LENGTH
    assert engine.cache is cache
    assert cache.is_whole()
    engine.check_text()
    engine.check_idle()


def test_several_at_once_share_the_room(small, shelf):
    engine = small(8)
    for name in "abc":
        engine.add(name, [*PROMPT, ord(name)])
    engine.run()
    assert not any(engine.runner.invalid)
    engine.check_text()
    engine.check_idle()


def begun(engine, shelf, windows=2):
    """A request some of whose windows have been loaded, and the rest of which wait at the gate."""
    shelf.gate = threading.Semaphore(windows)
    engine.add("warm", PROMPT)
    for _ in range(500):
        engine.step()
        if sum(len(step.loads) for step in engine.steps) == windows:
            return
    raise AssertionError("no window is loaded")


def test_a_request_that_is_aborted_gives_everything_back(small, shelf):
    engine = small()
    begun(engine, shelf)
    engine.abort("warm")
    shelf.gate.release(1 << 20)
    for _ in range(20):
        engine.step()
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 199
    engine.drain()
    engine.check_idle()
    assert engine.generate("again", PROMPT) == LENGTH
    engine.check_text("again")


def test_what_vanishes_on_the_way_is_computed(small, shelf):
    engine = small()
    begun(engine, shelf)
    for key in list(shelf.objects)[6:9]:
        del shelf.objects[key]
    shelf.gate.release(1 << 20)
    engine.run()
    assert 0 < engine.loaded < LENGTH
    assert len(set().union(*engine.runner.invalid)) < LENGTH // 4, "what was loaded is kept"
    engine.check_text()
    engine.check_idle()


def test_a_server_that_goes_on_the_way(small, shelf):
    engine = small()
    begun(engine, shelf)
    shelf.gate.release(1 << 20)
    engine.house.close()
    engine.wait_attached(False)
    engine.run()
    engine.check_text()
    assert not engine.side._promises


def test_a_window_that_does_not_come_in_time(small, shelf):
    engine = small(house={"fetch_timeout_s": 0.3})
    begun(engine, shelf)
    engine.run()
    engine.check_text()
    shelf.gate.release(1 << 20)
    engine.check_idle()


def test_the_log_tells_of_all_of_it(small, shelf, lines):
    engine = small()
    engine.generate("warm", PROMPT)
    said = "Reqid: warm, Total tokens 240, LMCache hit tokens: 240, need to load: 240"
    assert lines.about("Reqid: warm") == [said]
    engine.check_idle()
