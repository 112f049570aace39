"""Beside another connector, under vLLM's `MultiConnector`: whoever loads, we store and hold
nothing.
"""

from __future__ import annotations

import pytest

THEIRS = 999
OURS = {
    "kv_connector": "LMCacheConnectorV1",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"lmcache.chunk_size": 16, "lmcache.max_local_cpu_size": 0.01},
}
OTHER = {
    "kv_connector": "OtherConnector",
    "kv_connector_module_path": "fake_other",
    "kv_role": "kv_both",
}


@pytest.fixture
def make_pair(rig, make_engine):
    def make(*, first, **options):
        connectors = [OURS, OTHER] if first else [OTHER, OURS]
        connector = {
            "kv_connector": "MultiConnector",
            "kv_connector_extra_config": {"connectors": connectors},
        }
        return make_engine(connector=connector, **options)

    return make


@pytest.mark.parametrize("first", [False, True])
def test_without_a_hit_of_theirs_all_is_as_ever(make_pair, first):
    engine = make_pair(first=first)
    assert engine.generate("cold", range(50), max_tokens=3) == 0
    assert engine.generate("warm", range(50), max_tokens=3) == 48
    engine.check_text()
    engine.check_idle()


def test_on_a_device_vllm_waits_for_our_stores_beside_another_connector(on_gpu):
    """Their loads write to pages that nobody tells us of."""
    alone = on_gpu("alone")
    connectors = {"connectors": [OURS, OTHER]}
    connector = {"kv_connector": "MultiConnector", "kv_connector_extra_config": connectors}
    beside = on_gpu("beside", connector=connector)
    assert [engine.ranks[0].side.stores._behind for engine in (alone, beside)] == [True, False]
    assert beside.generate("cold", range(50), max_tokens=3) == 0
    assert not beside.ranks[0].side.stores._fence._reader
    assert beside.generate("warm", range(50), max_tokens=3) == 48
    beside.settle()
    beside.check_text()
    beside.check_idle()


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_what_they_loaded_is_stored_by_us(make_pair, prefix_caching):
    engine = make_pair(first=False, prefix_caching=prefix_caching)
    prompt = [THEIRS, *range(80)]
    assert engine.generate("cold", prompt) == 0
    assert engine.stored == 80
    engine.scheduler.reset_prefix_cache()
    # both have it, theirs was asked first
    assert engine.generate("warm", prompt) == 0
    assert engine.stored == 80
    assert len(engine.cache.decider.leases) == 0
    engine.check_text()
    engine.check_idle()


def test_who_is_asked_first_loads(make_pair):
    engine = make_pair(first=True)
    prompt = [THEIRS, *range(80)]
    assert engine.generate("cold", prompt) == 0  # they had 32 tokens of it, we had none
    assert engine.generate("warm", prompt) == 80
    engine.check_text()
    engine.check_idle()


def test_a_request_of_theirs_that_comes_back_is_theirs(make_pair):
    engine = make_pair(first=False)
    engine.add("a", [THEIRS, *range(60)], max_tokens=30)
    for _ in range(10):
        engine.step()
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.run()
    assert engine.loaded == 0
    engine.check_text()
    engine.check_idle()
