"""SGLang's connector from 0.5.21 on, called in the order of its unified radix tree."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import rig
import torch
from house import House
from pool import MODEL, Pool, tokens

from lmcache.adapters.sglang.operations import Lookup
from lmcache.adapters.sglang.worker import Loading
from lmcache.backends.memory import MemoryBackend
from lmcache.core.errors import ConfigError, LayoutError
from lmcache.core.tier import Tier
from lmcache.core.tiers import Tiers
from lmcache.integration.sglang.lmcache_mp_metadata import LMCacheExternalFlow, LMCachePendingStore
from lmcache.integration.sglang.unified_lmcache_mp_connector import UnifiedLMCacheMPConnector
from lmcache.testing.faults import Slow

CHUNK = 16
FULL = SimpleNamespace(name="FULL")


class Allocator:
    """SGLang's, as far as a connector uses it."""

    def __init__(self, kvcache):
        self._kvcache = kvcache

    def get_kvcache(self):
        return self._kvcache

    def translate_kv_indices_for_transfer(self, indices):
        return indices


@pytest.fixture
def start(later):
    def start(*backends):
        made = rig.decider(64)
        later(made.slab.close)
        tiers = Tiers(made, [Tier(f"t{n}", backend) for n, backend in enumerate(backends)])
        later(tiers.close)
        house = House(made, tiers, chunk_size=CHUNK, modes=("engine_driven", "lmcache_driven"))
        later(house.close)
        return house

    return start


@pytest.fixture
def house(start):
    return start()


@pytest.fixture
def join(settings, later):
    def join(house, pool, *, page_size=1, kvcache=None, components=(FULL,), window=None, **said):
        host, _, port = house.endpoint.removeprefix("tcp://").rpartition(":")
        kvcache = kvcache or SimpleNamespace(k_buffer=pool.k, v_buffer=pool.v)
        about = {"tp_size": 1, "tp_rank": 0, "pp_size": 1, "pp_rank": 0, **said}
        connector = UnifiedLMCacheMPConnector(
            config_file=settings(mp_host=host, mp_port=int(port)),
            model_config=MODEL,
            tp_group=None,
            pp_group=None,
            page_size=page_size,
            token_to_kv_pool_allocator=Allocator(kvcache),
            req_to_token_pool=None,
            tree_components=components,
            mamba_component=None,
            sliding_window_size=window,
            **about,
        )
        later(connector.close)
        return connector

    return join


def look_up(connector, prompt, have=0, rid="r", salt=""):
    """The tokens that are found, once it has been said that SGLang has the first `have`."""
    lookup = connector.submit_lookup(rid, prompt, local_hit_tokens=have, cache_salt=salt)
    deadline = time.monotonic() + 10
    while (total := connector.poll_lookup(lookup)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    if have // CHUNK:
        connector.free_lookup_locks(rid, start=0, end=min(total, have // CHUNK * CHUNK))
    return lookup, total


def load(connector, pool, lookup, own, total):
    """What SGLang does when it admits a request; the slots of all that is there then."""
    fresh = pool.take(total - len(own))
    groups = connector.device_indices_by_group(torch.tensor(fresh))
    operation = connector.submit_load(
        lookup,
        groups,
        local_hit_tokens=len(own),
        owned_device_indices=groups[0],
        producer_stream=None,
    )
    if not connector.prepare_load_on_stream(operation, None):
        pool.give(fresh)
        connector.free_lookup_locks(lookup.request_id, start=lookup.lock_start, end=total)
        return list(own)
    assert connector.ready_prefix_count([operation]) == 1
    assert connector.complete_load(operation)
    assert operation.result
    return [*own, *fresh]


def store(connector, pool, prompt, rid="r", salt="", start=None):
    """What SGLang does after a part of a prompt, or all of it, has been computed."""
    slots = pool.take(len(prompt))
    pool.compute(prompt, slots)
    done = store_slots(connector, prompt, slots, rid, salt)
    pool.give(slots)
    return done


def store_slots(connector, prompt, slots, rid="r", salt=""):
    stop = len(prompt) // CHUNK * CHUNK
    start = connector.get_store_start(rid, stop)
    if stop <= start:
        return None
    groups = connector.device_indices_by_group(torch.tensor(slots[start:stop]))
    operation = connector.submit_store(
        rid, prompt[:stop], groups, device_indices_start=start, cache_salt=salt
    )
    if operation is None:
        return None
    assert operation.request_id == rid
    assert connector.ready_prefix_count([operation]) == 1
    return connector.complete_store(operation)


def right(pool, prompt, slots):
    return all(pool.wrong(prompt, slots, layer) == [] for layer in range(pool.layers))


class TestRequests:
    @pytest.mark.parametrize("have", [0, 5, 16, 37, 95])
    def test_what_one_stored_another_loads(self, house, join, have):
        pools, prompt = [Pool(seed=1), Pool(seed=2)], tokens(100)
        one, two = (join(house, pool) for pool in pools)
        assert store(one, pools[0], prompt) is True
        one.finish_request("r")
        own = pools[1].take(have)
        pools[1].compute(prompt, own)
        lookup, total = look_up(two, prompt[:99], have)
        assert total == 96
        slots = load(two, pools[1], lookup, own, total)
        assert right(pools[1], prompt, slots)
        assert two.get_store_start("r", 96) == 96
        two.finish_request("r")
        house.wait_idle()
        assert not two._lookups
        assert not two._stored

    def test_sglang_has_as_much_itself(self, house, join):
        pool, prompt = Pool(), tokens(50)
        connector = join(house, pool)
        store(connector, pool, prompt)
        connector.finish_request("r")
        _, total = look_up(connector, prompt, 48)
        assert total == 48
        house.wait_idle()

    def test_a_lookup_that_leads_to_nothing(self, house, join):
        pool, prompt = Pool(), tokens(50)
        connector = join(house, pool)
        store(connector, pool, prompt)
        lookup, total = look_up(connector, prompt, 20)
        assert (lookup.lock_start, total) == (16, 48)
        connector.free_lookup_locks("r", start=lookup.lock_start, end=total)
        connector.free_lookup_locks("r", start=0, end=total)
        connector.free_lookup_locks("never", start=0, end=total)
        house.wait_idle()

    @pytest.mark.parametrize(("promised", "is_loaded"), [(59, True), (60, False), (96, False)])
    def test_sglang_has_evicted_what_it_had(self, house, join, promised, is_loaded):
        """It ends if it gets less than it counts on, but not if it gets nothing."""
        pool, prompt = Pool(), tokens(100)
        connector = join(house, pool)
        store(connector, pool, prompt)
        connector.finish_request("r")
        own = pool.take(37)
        lookup, total = look_up(connector, prompt, len(own))
        flow = LMCacheExternalFlow(key=prompt, lookup=lookup)
        flow.load_req = SimpleNamespace(host_hit_length=promised)
        assert len(load(connector, pool, lookup, own, total)) == (total if is_loaded else len(own))
        house.wait_idle()
        assert connector.errors == 0

    @pytest.mark.parametrize("length", [0, 1, 15])
    def test_less_than_a_chunk(self, house, join, length):
        pool = Pool()
        connector = join(house, pool)
        assert look_up(connector, tokens(length))[1] == 0
        assert store(connector, pool, tokens(length)) is None
        connector.finish_request("r")
        connector.finish_request("HEALTH_CHECK_1")
        assert connector.errors == 0

    def test_a_prompt_is_stored_as_it_is_computed(self, house, join):
        pool, prompt = Pool(), tokens(100)
        connector = join(house, pool)
        slots = pool.take(100)
        pool.compute(prompt, slots)
        for stop in (40, 70, 100):
            assert store_slots(connector, prompt[:stop], slots) is True
        assert store_slots(connector, prompt, slots) is None
        connector.finish_request("r")
        house.wait_idle()
        lookup, total = look_up(connector, prompt)
        assert right(pool, prompt, load(connector, pool, lookup, [], total))

    def test_salts_are_kept_apart(self, house, join):
        pool, prompt = Pool(), tokens(50)
        connector = join(house, pool)
        salts = [
            connector.build_cache_salt(salt, extra)
            for salt in (None, "a", "b", '["a", null]')
            for extra in (None, "a", "lora")
        ]
        assert len(set(salts)) == len(salts)
        assert salts[3] == "a", "as other engines have it"
        store(connector, pool, prompt, salt=salts[3])
        house.wait_idle()
        found = [
            look_up(connector, prompt, rid=f"{n}", salt=salt)[1] for n, salt in enumerate(salts)
        ]
        assert found == [0, 0, 0, 48, *[0] * 8]

    def test_slower_tiers_are_waited_for_without_blocking(self, start, join):
        house = start(Slow(MemoryBackend(), 0.2))
        pool, prompt = Pool(), tokens(50)
        connector = join(house, pool)
        store(connector, pool, prompt)
        house.wait_idle()
        house.server.service.tiers.flush()
        house.server.ask(lambda service: service.decider.clear())
        connector.finish_request("r")
        lookup = connector.submit_lookup("s", prompt, local_hit_tokens=0, cache_salt="")
        started, polls = time.monotonic(), 0
        while (total := connector.poll_lookup(lookup)) is None:
            polls += 1
            assert time.monotonic() - started < 10
        assert polls > 10
        assert total == 48
        assert right(pool, prompt, load(connector, pool, lookup, [], total))


class TestTroubles:
    def test_a_load_that_fails_is_computed(self, house, join, monkeypatch):
        pool, prompt = Pool(), tokens(50)
        connector = join(house, pool)
        store(connector, pool, prompt)
        lookup, total = look_up(connector, prompt)
        monkeypatch.setattr(Loading, "whole", lambda self: False)
        assert load(connector, pool, lookup, [], total) == []
        connector.finish_request("r")
        house.wait_idle()

    def test_a_store_that_fails_may_be_made_again(self, house, join):
        pool, prompt = Pool(), tokens(50)
        connector = join(house, pool)
        kept, connector._cache.store = connector._cache.store, None
        assert store(connector, pool, prompt) is False
        assert connector.get_store_start("r", 48) == 0
        connector._cache.store = kept
        assert store(connector, pool, prompt) is True
        assert connector.get_store_start("r", 48) == 48

    def test_other_ranks_that_fail(self, house, join):
        pool, prompt = Pool(), tokens(50)
        connector = join(house, pool)
        store(connector, pool, prompt)
        lookup, total = look_up(connector, prompt)
        connector._tp.least = lambda number: 0
        assert load(connector, pool, lookup, [], total) == []
        slots = pool.take(48)
        done = connector.submit_store(
            "s", prompt[:48], [torch.tensor(slots)], device_indices_start=0, cache_salt=""
        )
        assert done.query()
        assert connector.ready_prefix_count([done]) == 0
        assert not connector.complete_store(done)
        assert connector.get_store_start("s", 48) == 0
        connector._tp.least = lambda number: -1
        assert connector.poll_lookup(lookup) is None

    def test_errors_are_misses_and_the_ranks_still_agree(self, house, join, errors):
        pool, prompt, asked = Pool(), tokens(50), []
        connector = join(house, pool)
        connector._tp.least = lambda number: asked.append(number) or number
        connector._cache.scheduler.ask = None
        for _ in range(5):
            assert look_up(connector, prompt)[1] == 0
        assert asked == [0] * 5
        assert len(errors) == 3

    def test_an_error_while_a_lookup_is_under_way_gives_it_back(self, start, join, monkeypatch):
        house = start(Slow(MemoryBackend(), 0.2))
        connector = join(house, Pool())
        lookup = connector.submit_lookup("r", tokens(50), local_hit_tokens=0, cache_salt="")
        given_up = []
        scheduler = connector._cache.scheduler
        monkeypatch.setattr(scheduler, "poll", None)
        monkeypatch.setattr(scheduler, "give_up", given_up.append)
        asked = lookup.asked
        assert connector.poll_lookup(lookup) == 0
        assert given_up == [asked]

    def test_a_server_that_is_gone_costs_nothing(self, house, join):
        pool, prompt = Pool(), tokens(50)
        connector = join(house, pool)
        store(connector, pool, prompt)
        lookup, total = look_up(connector, prompt)
        house.close()
        started = time.monotonic()
        load(connector, pool, lookup, [], total)
        assert look_up(connector, prompt, rid="s")[1] == 0
        store(connector, pool, tokens(50, 2), "t")
        connector.end_all_sessions()
        assert time.monotonic() - started < 3
        assert connector.errors == 0

    def test_the_first_page_is_nobodys(self, house, join):
        pool, prompt = Pool(slots=399), tokens(50)
        connector = join(house, pool, page_size=16)
        assert store_slots(connector, prompt, [3, *range(100, 149)]) is None
        assert store_slots(connector, prompt, list(range(100, 150))) is True

    def test_flushed_in_the_middle(self, house, join):
        pool, prompt = Pool(), tokens(50)
        connector = join(house, pool)
        store(connector, pool, prompt)
        look_up(connector, prompt)
        connector.submit_lookup("s", prompt, local_hit_tokens=0, cache_salt="")
        connector.end_all_sessions()
        house.wait_idle()
        assert connector.clear() is False
        connector.close()
        connector.close()


class TestWhatCannotBe:
    @pytest.mark.parametrize(
        ("components", "window", "said"),
        [
            ((FULL, SimpleNamespace(name="SWA")), 128, "FULL and SWA"),
            ((FULL, SimpleNamespace(name="MAMBA")), None, "FULL and MAMBA"),
            ((FULL,), 64, "window 64"),
        ],
    )
    def test_models_that_do_not_look_at_everything(self, house, join, components, window, said):
        with pytest.raises(LayoutError, match=said):
            join(house, Pool(), components=components, window=window)

    def test_pools_of_another_kind(self, house, join):
        pool = Pool()
        with pytest.raises(LayoutError, match="latent attention"):
            join(house, pool, kvcache=SimpleNamespace(kv_buffer=pool.k))
        other = SimpleNamespace(k_buffer=pool.k, v_buffer=pool.v, kv_cache_layout="hnd")
        with pytest.raises(LayoutError, match="hnd"):
            join(house, pool, kvcache=other)

    def test_chunks_that_are_no_whole_pages(self, house, join):
        with pytest.raises(ConfigError, match="not whole pages of 12"):
            join(house, Pool(), page_size=12)

    def test_ranks_and_stages_share_nothing(self, house, join):
        pool, prompt = Pool(), tokens(50)
        store(join(house, pool), pool, prompt)
        for said in ({"tp_size": 2, "tp_rank": 1}, {"pp_size": 2}, {"pp_size": 2, "pp_rank": 1}):
            other = join(house, pool, **said)
            other._tp.least = other._pp.least = lambda number: number
            assert look_up(other, prompt)[1] == 0


def test_sglangs_own_records():
    flow = LMCacheExternalFlow(key=1, lookup=Lookup("r", None))
    assert (flow.load, flow.total_hit, flow.loaded_skip_tokens) == (None, None, 0)
    assert (flow.promised, flow.lookup.flow) == (0, flow)
    assert LMCachePendingStore(1, 2, 3).lock_params == 3
