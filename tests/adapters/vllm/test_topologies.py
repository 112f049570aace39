"""Ranks, processes, several engines, layers one by one: the same bytes arrive whatever carries
them.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lmcache.core.mover import Mover


def a_day(engine, prefix=""):
    """Cold, warm, longer, in pieces, side by side: the ways of a request, every byte checked."""
    name = prefix.__add__
    assert engine.generate(name("cold"), range(50), max_tokens=4) == 0
    assert engine.generate(name("warm"), range(50), max_tokens=4) == 48
    assert engine.generate(name("longer"), range(150), max_tokens=4) == 48
    engine.add(name("a"), range(150), max_tokens=9)
    engine.add(name("b"), range(500, 560), max_tokens=9)
    engine.add(name("c"), [*range(48), *range(600, 640)], max_tokens=9)
    engine.run()
    engine.check_text()
    engine.check_idle()


@pytest.mark.parametrize("loads", ["early", "late"])
@pytest.mark.parametrize("drafter", [False, True])
@pytest.mark.parametrize("full_graph", [False, True])
def test_every_order_of_calls(make_engine, loads, drafter, full_graph):
    engine = make_engine(budget=40)
    engine.runner.loads, engine.runner.drafter = loads, drafter
    engine.runner.full_graph = full_graph
    a_day(engine)


@pytest.mark.parametrize("pickled", [False, True], ids=["by reference", "pickled"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_steps_cross_processes_or_do_not(make_engine, pickled, asynchronous):
    engine = make_engine(budget=40, asynchronous=asynchronous)
    engine.runner.pickled = pickled
    a_day(engine)


@pytest.mark.parametrize("second_runner", [False, True], ids=["MRV1", "MRV2"])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_steps_are_settled_one_later(make_engine, second_runner, prefix_caching):
    engine = make_engine(
        asynchronous=True,
        second_runner=second_runner,
        prefix_caching=prefix_caching,
        options={"save_decode_cache": True},
    )
    engine.add("a", range(60), max_tokens=30)
    engine.step()
    assert len(engine.in_flight) == 1
    assert len(engine.cache.decider) == 0
    engine.step()
    assert len(engine.cache.decider) == 0  # executed, but the scheduler has not looked since
    engine.step()
    assert len(engine.cache.decider) == 4
    engine.run()
    told = [*range(60), *engine.outputs["a"]]
    engine.scheduler.reset_prefix_cache()
    assert engine.generate("b", told) == 80
    engine.check_text()
    engine.check_idle()


# --- ranks


@pytest.mark.parametrize("layout", ["LBHNC", "BLNHC"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_ranks_with_a_half_of_the_heads_each(make_engine, layout, asynchronous):
    engine = make_engine(ranks=2, layout=layout, asynchronous=asynchronous, budget=40)
    assert engine.cache.geometry.slices == (256, 256)
    a_day(engine)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_ranks_with_the_same_latents(make_engine, asynchronous):
    engine = make_engine(ranks=2, mla=True, asynchronous=asynchronous, budget=40)
    # stored once, by the first rank
    assert len(engine.cache.geometry.slices) == 1
    assert [rank.mover._writes for rank in engine.ranks] == [True, False]
    a_day(engine)


def test_one_rank_with_latents(make_engine):
    a_day(make_engine(mla=True))


def test_a_chunk_that_one_rank_has_not_stored_is_not_there(make_engine):
    engine = make_engine(ranks=2)
    engine.add("a", range(48))
    scheduled = engine.schedule()
    mover = engine.ranks[1].mover

    class Lazy:
        def __getattr__(self, name):
            return getattr(mover, name)

        def publish(self, moves):
            pass

    engine.ranks[1].mover = Lazy()
    engine.complete(scheduled)
    engine.ranks[1].mover = mover
    engine.run()
    assert engine.counters["store_failures"] == 3
    assert engine.generate("b", range(48)) == 0
    engine.check_text()
    engine.check_idle()


def test_nothing_has_landed_before_every_rank_says_so(make_engine):
    engine = make_engine(ranks=2)
    engine.generate("a", range(48))
    engine.add("b", range(48))
    scheduled = engine.schedule()
    [first, second] = engine.ranks
    assert isinstance(first.mover, Mover)
    first.mover.finish(scheduled.kv_connector_metadata.number)
    assert len(engine.cache.flights) == 1
    engine.cache.depart([], [])
    assert len(engine.cache.decider.leases) == 1
    second.mover.finish(scheduled.kv_connector_metadata.number)
    engine.cache.depart([], [])
    assert len(engine.cache.decider.leases) == 0
    engine.complete(scheduled)
    engine.run()
    engine.check_text()
    engine.check_idle()


# --- engines


def test_two_engines_in_one_process(make_engine):
    engines = [make_engine(), make_engine()]
    for engine in engines:
        assert engine.generate("cold", range(50)) == 0
    for engine in engines:
        assert engine.generate("warm", range(50)) == 48
        engine.check_text()
        engine.check_idle()


def test_an_engine_after_another_with_the_same_id(make_engine):
    first = make_engine(engine_id="one")
    first.generate("cold", range(50))
    first.close()
    second = make_engine(engine_id="one")
    second.wait_attached()
    assert second.generate("cold", range(50)) == 0
    assert second.generate("warm", range(50)) == 48
    second.check_text()
    second.check_idle()


def test_an_engine_that_was_shut_down_goes_on_without_a_cache(engine):
    engine.generate("cold", range(50))
    engine.impl.shutdown()
    engine.impl.shutdown()
    for rank in engine.ranks:
        rank.impl.shutdown()
        rank.impl.shutdown()
    assert engine.generate("after", range(50)) == 0
    engine.check_text()


def test_scripts_can_shut_down_what_is_alive(engine):
    from lmcache.integration.vllm.utils import ENGINE_NAME
    from lmcache.v1.cache_engine import LMCacheEngineBuilder

    engine.generate("cold", range(50))
    LMCacheEngineBuilder.destroy(ENGINE_NAME)
    assert engine.generate("after", range(50)) == 0
    engine.check_text()
    with pytest.raises(ValueError, match="no engine"):
        LMCacheEngineBuilder.destroy("another")


# --- layer by layer


@pytest.mark.parametrize("loads", ["early", "late"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("full_graph", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_layer_by_layer(make_engine, loads, ranks, full_graph, asynchronous):
    engine = make_engine(
        budget=40, ranks=ranks, asynchronous=asynchronous, options={"use_layerwise": True}
    )
    engine.runner.loads, engine.runner.full_graph = loads, full_graph
    a_day(engine)


class Counting:
    """A mover that notes which regions it copied."""

    def __init__(self, mover):
        self._mover, self.loaded, self.stored = mover, [], []

    def __getattr__(self, name):
        return getattr(self._mover, name)

    def load(self, moves, region=None, after=None):
        self.loaded.append(region)
        return self._mover.load(moves, region, after)

    def store(self, moves, region=None, after=None):
        self.stored.append(region)
        return self._mover.store(moves, region, after)


@pytest.mark.parametrize("loads", ["early", "late"])
def test_layers_are_copied_as_they_are_computed(make_engine, loads):
    engine = make_engine(options={"use_layerwise": True})
    engine.runner.loads = loads
    [rank] = engine.ranks
    rank.mover = counting = Counting(rank.mover)
    engine.generate("cold", range(60))
    assert (counting.loaded, counting.stored) == ([], [0, 1])
    engine.generate("warm", range(90))
    assert (counting.loaded, counting.stored) == ([0, 1], [0, 1, 0, 1])
    engine.check_text()
    engine.check_idle()


def test_without_layers_a_step_is_copied_whole(engine):
    [rank] = engine.ranks
    rank.mover = counting = Counting(rank.mover)
    engine.generate("cold", range(60))
    engine.generate("warm", range(90))
    assert (counting.loaded, counting.stored) == ([None], [None, None])


def test_a_layer_that_is_not_asked_for_is_loaded_all_the_same(make_engine):
    engine = make_engine(options={"use_layerwise": True})
    engine.generate("cold", range(48))
    connector = engine.ranks[0].connector
    wait = connector.wait_for_layer_load
    connector.wait_for_layer_load = lambda name: wait(name) if ".0." in name else None
    engine.add("warm", range(60), max_tokens=2)
    scheduled = engine.schedule()
    engine.runner.execute(scheduled)
    pages = engine.runner.sequences["warm"].tables[0][:12]
    codes = engine.runner.sequences["warm"].codes.upto(range(48))
    for layer in (0, 1):
        assert (engine.ranks[0].content(layer, pages) == expected(codes, layer)).all()


def test_what_no_layer_asked_for_is_loaded_before_it_is_stored(make_engine):
    """A chunk that was half there is stored whole, with the pages that are loaded at the end."""
    engine = make_engine(options={"use_layerwise": True})
    engine.generate("cold", range(40))
    connector = engine.ranks[0].connector
    wait, save = connector.wait_for_layer_load, connector.save_kv_layer
    connector.wait_for_layer_load = lambda name: wait(name) if ".0." in name else None
    connector.save_kv_layer = lambda name, *rest: save(name, *rest) if ".0." in name else None
    assert engine.generate("longer", range(60)) == 40
    del connector.wait_for_layer_load, connector.save_kv_layer
    before = len(engine.runner.wrong)
    assert engine.generate("again", range(60)) == 59
    assert not any(engine.runner.wrong[before:])


def expected(codes, layer):
    import sys

    return sys.modules["fake_codes"].words(codes, layer, 0, 2, 2).astype("int64")


def test_layers_need_vllm_to_call_them(make_engine, base_config, lines):
    import copy

    from lmcache.adapters.vllm.connector import _layerwise_is_safe

    config = copy.copy(base_config)
    config.model_config = copy.copy(base_config.model_config)
    config.device_config = copy.copy(base_config.device_config)
    assert _layerwise_is_safe(config, {})
    config.model_config.enforce_eager = False
    assert _layerwise_is_safe(config, {})  # the CPU has no graphs
    config.device_config.device_type = "cuda"
    assert not _layerwise_is_safe(config, {})
    assert len(lines.about("use_layerwise")) == 1
    assert _layerwise_is_safe(config, {"use_layerwise": True})


# ---- what stores behind the engine have to keep off


def scheduled(new=(), cached=()):
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, block_ids=tables, num_computed_tokens=computed)
            for name, tables, computed in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, *_ in cached],
            new_block_ids=[tables for _, tables, *_ in cached],
            num_computed_tokens=[computed for *_, computed, _ in cached],
            resumed_req_ids={name for name, *_, resumed in cached if resumed},
        ),
    )


def test_pages_that_a_step_may_write_to(rig):
    from lmcache.adapters.vllm.scheduler import _fresh

    assert list(_fresh(scheduled(), 4)) == []
    new = scheduled(new=[("a", ([3, 4, 5], [6, 7, 8]), 5)])
    assert list(_fresh(new, 4)) == [4, 5, 7, 8], "the page with the last token that was found, too"
    grown = scheduled(cached=[("a", ([9],), 12, False), ("b", None, 7, False)])
    assert list(_fresh(grown, 4)) == [9], "whatever has been computed, it is a new page"
    resumed = scheduled(cached=[("a", ([3, 9, 5],), 4, True)])
    assert list(_fresh(resumed, 4)) == [9, 5]


@pytest.mark.parametrize(
    ("change", "may_lag"),
    [
        (lambda config, pages: None, True),
        (lambda config, pages: setattr(config.model_config, "enable_sleep_mode", True), False),
        (lambda config, pages: setattr(pages, "needs_kv_cache_zeroing", True), False),
        (
            lambda config, pages: setattr(
                config.kv_transfer_config, "kv_connector", "MultiConnector"
            ),
            False,
        ),
    ],
)
def test_vllm_waits_for_stores_where_others_write_to_pages(change, may_lag):
    from lmcache.adapters.vllm.translate import stores_may_lag

    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector="LMCacheConnectorV1"),
        model_config=SimpleNamespace(enable_sleep_mode=False),
    )
    pages = SimpleNamespace()
    change(config, pages)
    assert stores_may_lag(config, pages) is may_lag


def test_a_store_that_may_not_lag_is_made_at_once(on_gpu, monkeypatch):
    monkeypatch.setattr("lmcache.adapters.vllm.worker.stores_may_lag", lambda *_: False)
    engine = on_gpu("at once")
    for name in "ab":
        engine.generate(name, range(60), max_tokens=2)
        assert not engine.ranks[0].side.stores._fence._reader
        assert len(engine.cache.flights) == 0
    assert engine.loaded > 0
    engine.settle()
    assert not any(engine.runner.wrong)
    engine.check_text()
    engine.check_idle()
