"""Thousands of steps of random traffic over too few pages and too little memory, every byte
checked.
"""

from __future__ import annotations

import random
import time
from contextlib import suppress
from functools import partial

import pytest

from lmcache.backends.memory import MemoryBackend

DOCUMENTS, LENGTH = 6, 200
SLOT = 8192
STEPS = 400
TIGHT = 19 * SLOT
"""About a quarter of what the documents alone need."""


class Traffic:
    """Random requests, and random trouble for them."""

    def __init__(self, engine, seed, *, trouble, often=0.05):
        self.engine = engine
        self.cache = engine.cache
        self.rng = random.Random(seed)
        self.trouble, self.often = trouble, often
        self.count = 0
        self.alive = []
        self.skew = 0.0
        self.documents = [
            [self.rng.randrange(900) for _ in range(LENGTH)] for _ in range(DOCUMENTS)
        ]
        decider = engine.decider
        clock = decider._clock
        decider._clock = lambda: clock() + self.skew

    def prompt(self):
        start = self.rng.choice(self.documents)[: self.rng.randint(1, LENGTH)]
        if self.rng.random() < 0.5:
            start = start + [self.rng.randrange(900) for _ in range(self.rng.randint(1, 30))]
        return start

    def arrive(self):
        name = str(self.count)
        self.count += 1
        options = {"max_tokens": self.rng.randint(1, 24), "priority": self.rng.randint(0, 3)}
        if self.rng.random() < 0.1:
            options["cache_salt"] = self.rng.choice("ab")
        if self.rng.random() < 0.1:
            options["transfer"] = {"lmcache.skip_save": True}
        if self.rng.random() < 0.05:
            options["sampling"] = {"skip_reading_prefix_cache": True}
        self.engine.add(name, self.prompt(), **options)
        self.alive.append(name)

    def leave(self):
        unfinished = [name for name in self.alive if name not in self.engine.finished]
        if unfinished:
            self.engine.abort(self.rng.choice(unfinished))

    def disturb(self):
        kind = self.rng.choice(self.trouble)
        engine = self.engine
        if kind == "reset":
            engine.scheduler.reset_prefix_cache()
        elif kind == "preempt":
            with suppress(RuntimeError):  # while pages are being loaded, it preempts but keeps them
                engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        elif kind == "clear":
            engine.decider.clear()
        elif kind == "expire":
            self.skew += 1000.0
        elif kind == "break":
            break_some(engine.decider, engine.cache.geometry, self.rng)

    def run(self, steps):
        for _ in range(steps):
            chance = self.rng.random()
            if chance < 0.35 and len(self.engine.scheduler.requests) < 12:
                self.arrive()
            elif chance < 0.40:
                self.leave()
            elif chance < 0.40 + self.often:
                self.disturb()
            self.step()
        while self.engine.scheduler.requests:
            self.step()
        self.engine.drain()
        assert self.engine.cache is self.cache
        assert self.cache.is_whole()

    def step(self):
        if not self.engine.step().total_num_scheduled_tokens:
            time.sleep(0.0002)  # something is being fetched


def break_some(decider, geometry, rng):
    """Have random complete slots hold something else than what the index says."""
    with decider.lock:
        entries = list(decider._shelf.policy.victims())
        for entry in rng.sample(entries, min(2, len(entries))):
            tag = decider._index.offset[entry] + geometry.tag_offset(0)
            decider.slab.write_word(tag, 1)


PLANS = {
    "plain": {},
    "prefix caching": {"prefix_caching": True},
    "second runner": {"second_runner": True, "prefix_caching": True},
    "by priority": {"scheduling": "priority", "prefix_caching": True},
    "decode too": {"options": {"save_decode_cache": True}},
    "whole chunks": {"options": {"save_unfull_chunk": False, "min_retrieve_tokens": 24}},
    "layer by layer": {"options": {"use_layerwise": True}, "prefix_caching": True},
    "pages outermost": {"layout": "BLNHC", "prefix_caching": True},
    "two ranks": {"ranks": 2, "prefix_caching": True},
    "two ranks of latents": {"ranks": 2, "mla": True, "options": {"save_decode_cache": True}},
    "small pieces": {"budget": 13, "prefix_caching": True},
    "ahead": {"asynchronous": True, "prefix_caching": True},
    "ahead, second runner": {
        "asynchronous": True,
        "second_runner": True,
        "options": {"save_decode_cache": True},
    },
    "ahead, two ranks": {"asynchronous": True, "ranks": 2},
    "slower tier": {"options": {"l2": ["memory://?max_size=400000"]}},
    "slower tier, ahead": {
        "asynchronous": True,
        "prefix_caching": True,
        "options": {"l2": ["memory://?max_size=400000"], "save_decode_cache": True},
    },
}
HYBRID = {"windows": (12, 12, None)}
SERVED = {
    "plain": {},
    "prefix caching": {"prefix_caching": True},
    "decode too": {"options": {"save_decode_cache": True}},
    "two ranks": {"ranks": 2, "prefix_caching": True},
    "ahead": {"asynchronous": True, "prefix_caching": True},
    "blocking": {"extra": {"lmcache.mp.nonblocking_lookup_status": False}},
    "eager": {"extra": {"lmcache.mp.eager_prefetch": True}, "prefix_caching": True},
    "lending": {"extra": {"lmcache.mp.mp_transfer_mode": "lmcache_driven"}},
    "streams": {"slots": 6},
    "streams, prefix caching": {"slots": 6, "prefix_caching": True},
    "streams, ahead": {"slots": 6, "asynchronous": True},
    "streams, two ranks": {"slots": 6, "ranks": 2},
    "streams, lending": {
        "slots": 6,
        "extra": {"lmcache.mp.mp_transfer_mode": "lmcache_driven"},
    },
    "groups": HYBRID,
    "groups, prefix caching": {**HYBRID, "prefix_caching": True},
    "groups, decode too": {**HYBRID, "options": {"save_decode_cache": True}},
    "groups, small pieces": {**HYBRID, "budget": 13, "prefix_caching": True},
    "groups, whole chunks": {**HYBRID, "options": {"save_unfull_chunk": False}},
    "groups, ahead": {**HYBRID, "asynchronous": True, "prefix_caching": True},
    "groups, two ranks": {**HYBRID, "ranks": 2},
    "groups, lending": {**HYBRID, "extra": {"lmcache.mp.mp_transfer_mode": "lmcache_driven"}},
}
"""With a cache that is a server's."""
CALM = ["reset", "preempt", "clear", "expire"]


@pytest.mark.parametrize("plan", PLANS)
def test_every_byte_is_right(make_engine, plan):
    options = {"pages": 90, "room_bytes": TIGHT, **PLANS[plan]}
    engine = make_engine(**options)
    engine.runner.pickled = True
    # vLLM does not reset by force while steps are in flight
    trouble = [kind for kind in CALM if kind != "preempt" or not engine.asynchronous]
    traffic = Traffic(engine, plan, trouble=trouble)
    traffic.run(STEPS)
    assert engine.impl.errors == 0
    assert all(rank.impl.errors == 0 for rank in engine.ranks)
    assert not any(engine.runner.invalid)
    assert engine.loaded > 0
    engine.check_text()
    engine.check_idle()


@pytest.mark.parametrize("plan", PLANS)
def test_broken_slots_are_never_served(make_engine, plan):
    # vLLM 0.32 forgets to drop pages that failed to load from its own prefix cache when their
    # request is aborted or preempted before it has computed them
    options = {"pages": 90, "room_bytes": TIGHT, **PLANS[plan], "prefix_caching": False}
    if options.get("asynchronous"):
        options["policy"] = "fail"  # nor does it go back for a step that is in flight
    engine = make_engine(**options)
    trouble = ["reset", "break", "break", "break"]
    traffic = Traffic(engine, plan + "!", trouble=trouble, often=0.4)
    traffic.run(STEPS)
    assert engine.impl.errors == 0
    assert any(engine.runner.invalid)
    engine.check_text()
    engine.check_idle()


@pytest.fixture
def served(make_engine, make_house):
    def make(plan, make_engine=make_engine, **more):
        options = {"pages": 180 if "groups" in plan else 90, **SERVED[plan], **more}
        slots = options.pop("slots", None)  # for fewer tokens than a prompt has
        tiers = [MemoryBackend(max_size=1 << 30)] if slots else []
        room = slots * SLOT if slots else TIGHT
        house = make_house(room, *tiers, modes=("engine_driven", "lmcache_driven"))
        engine = make_engine(house=house, **options)
        engine.wait_attached()
        return engine

    return make


@pytest.mark.parametrize("plan", SERVED)
def test_every_byte_from_a_server_is_right(served, plan):
    engine = served(plan)
    engine.runner.pickled = True
    trouble = ["reset", "clear"] if engine.asynchronous else ["reset", "clear", "preempt"]
    traffic = Traffic(engine, plan, trouble=trouble)
    traffic.run(STEPS)
    assert engine.impl.errors == 0
    assert all(rank.impl.errors == 0 for rank in engine.ranks)
    assert not any(engine.runner.invalid)
    assert not engine.runner.refused
    assert engine.loaded > 0
    engine.check_text()
    engine.check_idle()


@pytest.mark.parametrize("plan", SERVED)
def test_broken_slots_of_a_server_are_never_served(served, plan):
    engine = served(plan, prefix_caching=False)
    # a lease that ends on the server's clock alone: the engine does not know of it in time
    trouble = ["reset", "expire", "break", "break", "break"]
    traffic = Traffic(engine, plan + "!", trouble=trouble, often=0.4)
    traffic.run(STEPS)
    assert engine.impl.errors == 0
    assert bool(engine.runner.refused) == ("groups" in plan)
    assert any(engine.runner.invalid) == ("groups" not in plan)
    engine.check_text()
    engine.check_idle()


ON_GPU = {name: plan for name, plan in PLANS.items() if "ranks" not in plan}
ON_GPU["layer by layer, ahead"] = {"options": {"use_layerwise": True}, "asynchronous": True}


def check_right(engine):
    """Nothing went wrong, and no page was read or stored before it was there."""
    engine.settle()
    assert engine.impl.errors == 0
    assert all(rank.impl.errors == 0 for rank in engine.ranks)
    assert not any(engine.runner.invalid)
    assert not any(engine.runner.wrong)
    assert engine.loaded > 0
    engine.check_text()
    engine.check_idle()


@pytest.mark.parametrize("plan", ON_GPU)
def test_every_byte_on_a_device_is_right(on_gpu, plan):
    """Stores are made behind the engine, loads before it, and neither sees what is not there."""
    engine = on_gpu(plan, **{"pages": 90, "room_bytes": TIGHT, **ON_GPU[plan]})
    engine.runner.pickled = True
    trouble = [kind for kind in CALM if kind != "preempt" or not engine.asynchronous]
    Traffic(engine, plan, trouble=trouble).run(STEPS)
    check_right(engine)


@pytest.mark.parametrize("plan", [plan for plan in ON_GPU if "ahead" not in plan])
def test_broken_slots_are_never_served_on_a_device(on_gpu, plan):
    options = {"pages": 90, "room_bytes": TIGHT, **ON_GPU[plan], "prefix_caching": False}
    engine = on_gpu(plan + "!", **options)
    trouble = ["reset", "break", "break", "break"]
    Traffic(engine, plan + "!", trouble=trouble, often=0.4).run(STEPS)
    engine.settle()
    assert engine.impl.errors == 0
    assert any(engine.runner.invalid)
    engine.check_text()
    engine.check_idle()


@pytest.mark.parametrize(
    "plan", [name for name in SERVED if "ranks" not in name and "lending" not in name]
)
def test_every_byte_from_a_server_on_a_device_is_right(on_gpu, served, plan):
    engine = served(plan, partial(on_gpu, plan))
    engine.runner.pickled = True
    trouble = ["reset", "clear"] if engine.asynchronous else ["reset", "clear", "preempt"]
    Traffic(engine, plan, trouble=trouble).run(STEPS)
    assert not engine.runner.refused
    check_right(engine)
