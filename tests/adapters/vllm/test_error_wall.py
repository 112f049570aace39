"""Whatever goes wrong inside the connector, vLLM gets a neutral answer and no page passes for
loaded.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest

HOOKS = [
    "register_kv_caches",
    "bind_connector_metadata",
    "start_load_kv",
    "wait_for_layer_load",
    "save_kv_layer",
    "wait_for_save",
    "get_finished",
    "get_block_ids_with_load_errors",
    "get_kv_events",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "request_finished",
    "shutdown",
]


class Broken:
    """Raises for every call, or for the named ones only."""

    def __init__(self, whole=None, names=()):
        self._whole, self._names = whole, names

    def __getattr__(self, name):
        if self._whole is not None and name not in self._names:
            return getattr(self._whole, name)
        return self._raise

    def _raise(self, *args, **kwargs):
        raise RuntimeError("injected")


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_exists(engine, hook):
    for impl in (engine.impl, engine.ranks[0].impl):
        assert callable(getattr(impl, hook))


def test_vllms_wrapper_finds_our_class(engine, rig):
    from vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector import LMCacheConnectorV1

    from lmcache.integration.vllm.vllm_v1_adapter import LMCacheConnectorV1Impl

    for connector in (engine.scheduler.connector, engine.ranks[0].connector):
        assert type(connector) is LMCacheConnectorV1
        assert type(connector._lmcache_engine) is LMCacheConnectorV1Impl


def test_the_wrapper_calls_no_hook_we_lack(rig):
    """Every method of the Impl that the wrapper's source names is in our list."""
    import re

    from vllm.distributed.kv_transfer.kv_connector.v1 import lmcache_connector

    source = inspect.getsource(lmcache_connector)
    called = set(re.findall(r"self\._lmcache_engine\.(\w+)\(", source))
    called |= set(re.findall(r'getattr\(self\._lmcache_engine, "(\w+)"', source))
    called |= set(re.findall(r'hasattr\((?:self\._lmcache_engine|engine), "(\w+)"\)', source))
    assert called - {"current_layer", "layerwise_retrievers"} <= set(HOOKS)
    assert {"start_load_kv", "build_connector_meta", "request_finished"} <= called


def test_the_wrapper_passes_everything_through(engine):
    connector = engine.scheduler.connector
    request = engine.request("a", range(40))
    assert connector.get_num_new_matched_tokens(request, 0) == (0, False)
    assert connector.update_state_after_alloc(request, None, 0) is None
    assert connector.request_finished(request, []) == (False, None)
    assert connector.get_finished_count() is None
    assert list(connector.take_events()) == []
    worker = engine.ranks[0].connector
    step = engine.schedule().kv_connector_metadata
    worker.bind_connector_metadata(step)
    worker.start_load_kv(SimpleNamespace(attn_metadata=None), request_ids=[], num_tokens=0)
    worker.wait_for_layer_load("model.layers.0.self_attn.attn")
    worker.save_kv_layer("model.layers.0.self_attn.attn", None, None, more=1)
    worker.wait_for_save()
    assert worker.get_finished(set()) == (None, None)
    assert worker.get_finished({"never seen"}) == (None, None)
    assert worker.get_block_ids_with_load_errors() == set()
    assert worker.get_kv_connector_kv_cache_events() is None
    worker.clear_connector_metadata()
    assert worker.shutdown() is None
    assert engine.impl.errors == engine.ranks[0].impl.errors == 0


def test_attributes_may_be_set_from_outside(engine):
    """vLLM 0.31 and later set one on connectors without `bind_connector_metadata`."""
    engine.impl.layerwise_storers = []


# --- a scheduling side that raises


def fail_first(side, hook, times):
    """Have the first calls of a hook raise; returns a list that grows with every call."""
    calls, real = [], getattr(side, hook)

    def fail(*args, **kwargs):
        calls.append(hook)
        if len(calls) <= times:
            raise RuntimeError("injected")
        return real(*args, **kwargs)

    setattr(side, hook, fail)
    return calls


@pytest.mark.parametrize("times", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "hook", ["matched_tokens", "allocated", "build", "finished", "_plan", "_hit", "_attached"]
)
def test_a_scheduling_side_that_raises(engine, hook, times):
    engine.generate("cold", range(48))
    side = engine.side
    calls = fail_first(side, hook, times)
    for number in range(5):
        engine.generate(str(number), [*range(48), *range(100, 100 + 10 * number)], max_tokens=3)
    assert calls
    engine.check_text()
    assert not set(engine.finished.values()) - {"length"}
    if times < 3:
        assert engine.impl.errors == times
        delattr(side, hook)
        assert engine.generate("after", range(48)) == 47
        engine.check_text()
        if hook == "finished":
            engine.side.lose_track()
        engine.check_idle()


def test_an_id_whose_end_was_not_heard_of_is_not_taken_for_its_last_request(engine):
    engine.impl._scheduler = Broken(engine.side, ["finished"])
    engine.generate("a", range(48), max_tokens=3)
    engine.impl._scheduler = engine.impl._scheduler._whole
    assert engine.side._tracked
    assert engine.generate("a", range(200, 260), max_tokens=3) == 0
    assert engine.generate("b", range(200, 260), max_tokens=3) == 59
    engine.check_text()
    engine.check_idle()


def test_after_three_errors_the_scheduling_side_stays_out_of_the_way(engine, lines):
    engine.generate("cold", range(48))
    engine.impl._scheduler = Broken(engine.side, ["matched_tokens"])
    for number in range(6):
        assert engine.generate(str(number), range(48)) == 0
    assert engine.impl.errors == 3
    assert len(lines.about("of 3 in get_num_new_matched_tokens")) == 3
    engine.check_text()


def test_an_allocation_that_is_not_heard_of_is_a_lost_load(engine):
    engine.generate("cold", range(48))
    engine.impl._scheduler = Broken(engine.side, ["allocated"])
    engine.add("warm", range(60), max_tokens=2)
    engine.step()
    assert len(engine.runner.invalid[-1]) == 12
    engine.impl._scheduler = engine.impl._scheduler._whole
    engine.run()
    engine.check_text()
    assert engine.generate("again", range(60)) == 59
    engine.check_idle()


def test_a_step_that_cannot_be_built_reports_what_it_was_to_load(engine):
    engine.generate("cold", range(48))
    engine.impl._scheduler = Broken(engine.side, ["build"])
    engine.add("a", range(60))
    engine.add("b", range(52))
    engine.step()
    assert len(engine.runner.invalid[-1]) == 24
    engine.impl._scheduler = engine.impl._scheduler._whole
    engine.run()
    engine.check_text()


def test_page_tables_stay_right_after_a_step_that_could_not_be_built(make_engine):
    engine = make_engine(budget=40)
    engine.add("a", range(20), max_tokens=30)
    engine.step()
    engine.add("b", range(100, 220), max_tokens=2)
    engine.step()
    real, calls = engine.side._plan, 0

    def fail(*args):
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("injected")
        return real(*args)

    engine.side._plan = fail
    engine.run()
    assert calls == 1  # neither is followed any further
    engine.check_text()
    engine.generate("b again", range(100, 220), max_tokens=2)
    engine.check_text()
    del engine.side._plan
    engine.check_idle()


@pytest.mark.parametrize("bad", ["null page", "short"])
def test_a_page_table_that_cannot_be_right_is_not_stored(engine, bad):
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

    request = engine.request("a", range(48))
    assert engine.impl.get_num_new_matched_tokens(request, 0) == 0
    engine.impl.update_state_after_alloc(request, 0)
    table = [1, 2, 0, *range(4, 13)] if bad == "null page" else list(range(1, 9))
    scheduled = SchedulerOutput.make_empty()
    scheduled.scheduled_new_reqs = [NewRequestData.from_request(request, (table,))]
    scheduled.num_scheduled_tokens = {"a": 48}
    assert isinstance(scheduled.scheduled_cached_reqs, CachedRequestData)
    step = engine.impl.build_connector_meta(scheduled)
    assert (step.number, step.stores, step.lost) == (0, [], [])
    assert engine.impl.errors == 1
    engine.impl.request_finished(request, table)
    engine.check_idle()


# --- a worker that raises


@pytest.mark.parametrize(
    ("hook", "arguments", "inside"),
    [
        ("bind_connector_metadata", [None], "begin"),
        ("start_load_kv", [SimpleNamespace(attn_metadata=None)], "start_load"),
        ("wait_for_layer_load", ["model.layers.0.self_attn.attn"], "load_layer"),
        ("save_kv_layer", ["model.layers.0.self_attn.attn", None, None], "store_layer"),
        ("wait_for_save", [], "finish"),
        ("get_kv_events", [], "take_events"),
        ("register_kv_caches", [{}], "register_kv_caches"),
    ],
)
def test_a_worker_hook_never_raises(engine, lines, hook, arguments, inside):
    impl = engine.ranks[0].impl
    engine.ranks[0].connector.bind_connector_metadata(engine.schedule().kv_connector_metadata)
    impl._worker = Broken(impl._worker, [inside])
    for _ in range(5):
        assert not getattr(impl, hook)(*arguments)
    impl._worker = impl._worker._whole
    assert len(lines.errors) == 3


@pytest.mark.parametrize("inside", ["begin", "start_load", "load_layer", "store_layer", "finish"])
@pytest.mark.parametrize("times", [1, 5])
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_worker_that_raises(make_engine, inside, times, layerwise):
    engine = make_engine(options={"use_layerwise": layerwise})
    engine.generate("cold", range(48))
    side = engine.ranks[0].side
    calls = fail_first(side, inside, times)
    for number in range(4):
        engine.generate(str(number), [*range(48), *range(100, 120 + 10 * number)], max_tokens=3)
    assert calls
    engine.check_text()
    delattr(side, inside)
    engine.generate("after", range(48))
    engine.check_text()


def test_steps_that_were_never_bound_are_no_error_of_vllms(engine):
    impl = engine.ranks[0].impl
    impl.start_load_kv(SimpleNamespace(attn_metadata=None))
    assert impl.get_block_ids_with_load_errors() == set()


def test_layers_nobody_registered_are_no_error(make_engine, lines):
    engine = make_engine(options={"use_layerwise": True})
    impl = engine.ranks[0].impl
    engine.ranks[0].connector.bind_connector_metadata(engine.schedule().kv_connector_metadata)
    impl.start_load_kv(SimpleNamespace(attn_metadata={}))
    impl.wait_for_layer_load("model.layers.0.cross_attn.attn")
    impl.save_kv_layer("model.layers.0.cross_attn.attn", None, None)
    impl.wait_for_save()
    assert impl.errors == 0
    assert lines.errors == []


def test_a_layout_nobody_knows_switches_the_cache_off(make_engine, lines, rig):
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    spec = SlidingWindowSpec(
        block_size=4, num_kv_heads=2, head_size=4, dtype=rig.torch.bfloat16, sliding_window=8
    )
    engine = make_engine(spec=spec)
    engine.generate("a", range(60), max_tokens=5)
    assert len(lines.about("LMCache is off for this engine")) == 1
    assert "LMCacheMPConnector" in lines.about("LMCache is off")[0]
    assert len(lines.errors) == 1
    assert engine.cache is None
    assert engine.ranks[0].impl.errors == 0
