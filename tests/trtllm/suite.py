"""What every connector must do, with blocks of 32 tokens and chunks of 64.

A test of a connector derives from this class and says what is plugged in:

    class TestOurs(ConnectorSuite):
        @pytest.fixture
        def plug(self, profile):
            return Plug(
                "lmcache.integration.tensorrt_llm.tensorrt_adapter",
                "LMCacheKvConnectorScheduler",
                "LMCacheKvConnectorWorker",
                preset="lmcache",
                ours=("lmcache",),
                close=destroy_engine,
            )
"""

from __future__ import annotations

import random

import pytest
import standin
import torch
from driver import Engine, prompt
from judge import BatchFailed

POLL = ("get_finished", [], [], [], [])
FROM_RUNTIME = ("query", "update", "meta", "load", "save", "cancel_load", "reset")


def queries(engine):
    """What was found for whom: tokens on the device, and tokens beyond those."""
    return [(call[2], call[3]) for call in engine.trace.of("query")]


def reports(engine, *, raw=False):
    """(which list, tokens, blocks, position, scheduled) of every report.

    Unless `raw`, those of who was loaded outside the batch are as if it had been in it.
    """
    outside = {} if raw else loaded_outside(engine)
    return [
        (kind, *told[1:3], told[3] - outside.get(told[0], 0) * (kind == "new"), told[4])
        for _, new, cached in engine.trace.of("meta")
        for kind, each in (("new", new), ("cached", cached))
        for told in each
    ]


def loaded_outside(engine):
    """How many tokens, by request."""
    taken = {call[1]: call[3] for call in engine.trace.of("query") if call[4]}
    for _, request_id, start, end in engine.trace.of("cancel_load"):
        taken[request_id] = taken.get(request_id, 0) - (end - start)
    return {request_id: count for request_id, count in taken.items() if count > 0}


def polls(engine, rank=0):
    """What was named to, and told by, each `get_finished`."""
    return [call[1:] for call in engine.ranks[rank].manager.trace.of("get_finished")]


def order(engine, *names):
    return [call[0] for call in engine.trace.of(*names)]


class ConnectorSuite:
    @pytest.fixture
    def start(self, profile, plug):
        """An engine with options; it must end with nothing left, and with a true cache."""

        def start(**options):
            return Engine(profile, plug, **options)

        return start

    @staticmethod
    def seed(engine, *prompts, **about):
        """The cache holds these, and the device nothing."""
        for tokens in prompts:
            engine.submit(tokens, **about)
            engine.run()
        engine.forget()
        engine.clear()

    @staticmethod
    def keep_nothing(engine):
        """Somebody always needs the room of what nobody holds."""
        engine.hooks.polling = lambda executor: executor.memory.forget()

    # --- A: nothing is known

    def test_a_fresh_prompt_is_computed_and_saved(self, start):
        with start() as engine:
            request = engine.submit(prompt(100), new_tokens=3)
            engine.run()
            blocks = request.tables[0]
            one_pass = ["meta", "load", "save"]
            assert order(engine, *FROM_RUNTIME) == ["query", "update", *one_pass * 3]
            assert queries(engine) == [(0, 0)]
            assert reports(engine) == [
                ("new", 100, 4, 0, 100),
                ("cached", 1, 0, 100, 1),
                ("cached", 1, 0, 101, 1),
            ]
            assert len(blocks) == 4
            assert engine.trace.of("update") == [("update", request.id, blocks)]
            [finished] = engine.trace.of("finished")
            assert finished[1:3] == (request.id, blocks)
            at = engine.trace.calls.index(finished)
            around = engine.trace.calls[at - 1][0], engine.trace.calls[at + 1][0]
            assert around == ("save", "get_finished")
            self.expect_found(engine, prompt(100), 64)

    def test_calls_are_as_many_as_passes(self, start, profile):
        for overlap in (False, True):
            with start(overlap=overlap, layers=3) as engine:
                engine.submit(prompt(70), new_tokens=4)
                engine.run()
                passes = 4 + (overlap and profile.surplus_forward)
                before = len(loaded_outside(engine))  # a pass of nobody
                counts = [engine.trace.count(name) for name in ("meta", "load", "save")]
                assert counts == [passes + before, passes + before, passes]
                assert engine.trace.count("hook") == passes * 3 * 2
                assert engine.trace.count("get_finished") >= 4 + overlap
                for name in ("query", "update", "finished"):
                    assert engine.trace.count(name) == 1

    def test_the_overlap_scheduler_tells_a_pass_later(self, start, profile):
        with start(overlap=True) as engine:
            engine.submit(prompt(96), new_tokens=3)
            engine.run()
            told = [("new", 96, 3, 0, 96), ("cached", 0, 1, 95, 1), ("cached", 1, 0, 96, 1)]
            surplus = [("cached", 1, 0, 97, 1)] if profile.surplus_forward else []
            assert reports(engine) == told + surplus
            engine.audit()

    def test_a_pass_that_is_replayed_calls_no_hook(self, start, profile):
        with start(graphs=True) as engine:
            self.seed(engine, prompt(130))
            engine.submit(prompt(130))
            engine.run()
            assert (engine.trace.count("hook") == 0) == profile.cuda_graphs
            assert queries(engine) == [(0, 128)]

    # --- B, C, E: something is known

    def test_a_full_hit_leaves_a_block_to_compute(self, start):
        with start() as engine:
            self.seed(engine, prompt(128))
            engine.submit(prompt(128))
            engine.run()
            [(device, found)] = queries(engine)
            assert (device, found) in {(0, 96), (0, 64)}  # half a chunk need not be usable
            assert reports(engine) == [("new", 128, 4, 0, 128 - found)]
            engine.audit()

    def test_what_the_device_has_is_not_loaded_again(self, start):
        with start() as engine:
            self.seed(engine, prompt(100))
            engine.submit(prompt(33))
            engine.run()
            engine.clear()
            engine.submit(prompt(100))
            engine.run()
            assert queries(engine) in ([(32, 32)], [(32, 0)])
            found = queries(engine)[0][1]
            assert reports(engine) == [("new", 100, 4, 32, 68 - found)]
            engine.audit()

    def test_what_the_device_has_may_be_all(self, start):
        with start() as engine:
            engine.submit(prompt(100))
            engine.run()
            engine.clear()
            engine.submit(prompt(100))
            engine.run()
            assert queries(engine) == [(96, 0)]
            assert reports(engine) == [("new", 100, 4, 96, 4)]
            engine.audit()

    def test_a_device_match_within_a_block_is_declined(self, start):
        with start(partial=True) as engine:
            self.seed(engine, prompt(100))
            engine.submit((*prompt(40), *prompt(60, seed=5)))
            engine.run()
            engine.clear()
            engine.submit(prompt(100))
            engine.run()
            assert queries(engine) == [(40, 0)]
            engine.audit()

    def test_without_block_reuse_nobody_is_asked(self, start, profile):
        if profile.main:
            with pytest.raises(ValueError, match="needs block reuse"):
                start(reuse=False)
            return
        with start(reuse=False) as engine:
            for _ in range(2):
                engine.submit(prompt(128), new_tokens=2)
                engine.run()
            assert engine.trace.count("query") == 0

    # --- D: a prompt in several passes

    def test_a_chunked_prefill_saves_what_is_computed(self, start, profile):
        with start(chunked=True, max_num_tokens=128) as engine:
            self.seed(engine, prompt(65))
            engine.submit(prompt(256))
            engine.run()
            first, more = (6, 2) if profile.layouts else (8, 0)
            assert queries(engine) == [(0, 64)]
            at_first = 2 if profile.layouts and loaded_outside(engine) else first
            assert len(engine.trace.of("update")[0][2]) == at_first
            assert reports(engine) == [
                ("new", 256, first, 0, 128),
                ("cached", 0, more, 192, 64),
            ]
            self.expect_found(engine, prompt(257), 256)

    def test_chunks_without_hits(self, start, profile):
        with start(chunked=True, max_num_tokens=128) as engine:
            engine.submit(prompt(256))
            engine.run()
            first, more = (4, 4) if profile.layouts else (8, 0)
            assert reports(engine) == [("new", 256, first, 0, 128), ("cached", 0, more, 128, 128)]
            assert engine.trace.count("query") == engine.trace.count("update") == 1
            self.expect_found(engine, prompt(257), 256)

    def expect_found(self, engine, tokens, count):
        """A request for these finds so many tokens in the cache, and they are right."""
        engine.forget()
        engine.submit(tokens)
        engine.run()
        assert queries(engine)[-1] == (0, count)
        engine.audit()

    # --- H: how requests end

    def test_a_request_cancelled_in_the_queue_was_never_there(self, start):
        with start() as engine:
            engine.cancel(engine.submit(prompt(100)))
            engine.run()
            assert engine.trace.without("get_finished") == []

    @pytest.mark.parametrize("overlap", [False, True])
    @pytest.mark.parametrize("after", [1, 2, 30])
    def test_a_cancelled_request_is_not_saved_from_later(self, start, profile, overlap, after):
        with start(overlap=overlap, blocks=16) as engine:
            self.keep_nothing(engine)
            request = engine.submit(prompt(100), new_tokens=40)
            engine.step(after)
            engine.cancel(request)
            engine.run()
            told = engine.trace.count("finished")
            assert told == profile.tells_of_cancels
            engine.submit(prompt(200, seed=1), new_tokens=3)
            engine.run()
            engine.audit()

    def test_a_cancelled_prefill_is_not_saved_from_later(self, start):
        with start(chunked=True, max_num_tokens=64, blocks=16) as engine:
            self.keep_nothing(engine)
            request = engine.submit(prompt(256))
            engine.step(2)
            engine.cancel(request)
            engine.run()
            engine.submit(prompt(200, seed=1), new_tokens=3)
            engine.run()
            engine.audit()

    def test_many_requests_may_end_without_a_word(self, start):
        with start() as engine:
            for seed in range(24):
                request = engine.submit(prompt(70, seed), new_tokens=9)
                engine.step(2)
                engine.cancel(request)
            engine.run()

    def test_a_batch_that_fails_is_all_that_fails(self, start):
        with start() as engine:
            worker = engine.ranks[0].manager.worker
            saved, worker.wait_for_save = worker.wait_for_save, lambda stream: 1 / 0
            requests = [engine.submit(prompt(100, seed), new_tokens=3) for seed in range(2)]
            engine.step()
            worker.wait_for_save = saved
            engine.run()
            assert all("ZeroDivisionError" in request.error for request in requests)
            engine.submit(prompt(100), new_tokens=3)
            engine.run()
            engine.audit()

    def test_a_pass_that_breaks_off_stores_nothing(self, start):
        with start() as engine:
            model = engine.ranks[0].model
            launch, model._launch = model._launch, self.breaks_off
            requests = [engine.submit(prompt(100, seed), new_tokens=3) for seed in range(2)]
            engine.step()
            model._launch = launch
            engine.run()
            assert all("kernel" in request.error for request in requests)
            engine.submit(prompt(100), new_tokens=3)
            engine.run()
            assert queries(engine)[-1] == (0, 0)
            engine.audit()

    @staticmethod
    def breaks_off(batch):
        raise BatchFailed("a kernel has failed")

    # --- I: ranks

    def test_each_rank_has_its_own(self, start):
        with start(ranks=2, layers=1) as engine:
            self.seed(engine, prompt(130), prompt(70, seed=1))
            engine.submit(prompt(130), new_tokens=2)
            engine.run()
            assert queries(engine) == [(0, 128)]
            engine.audit()

    # --- J: batches

    def test_two_equal_prompts_at_once(self, start, profile):
        with start() as engine:
            requests = [engine.submit(prompt(130), new_tokens=3) for _ in range(2)]
            engine.run()
            asked = ["query", "query", "update", "update"]
            together = asked if profile.asks_in_batches else ["query", "update"] * 2
            assert order(engine, "query", "update") == together
            assert queries(engine) == [(0, 0), (0, 0)]
            assert requests[0].tokens == requests[1].tokens
            self.expect_found(engine, prompt(130), 128)

    def test_prompts_and_decodes_share_a_pass(self, start):
        with start(chunked=True, max_num_tokens=128) as engine:
            engine.submit(prompt(70), new_tokens=8)
            engine.step(2)
            engine.submit(prompt(200, seed=1), new_tokens=3)
            engine.run()
            mixed = [new and cached for _, new, cached in engine.trace.of("meta")]
            assert any(mixed)
            engine.audit()

    def test_a_request_that_nobody_knows_is_ignored(self, start, profile):
        with start() as engine:
            engine.submit(prompt(100), new_tokens=3)
            reporter, api = engine.ranks[0].reporter, engine.ranks[0].reporter.api
            told = reporter.output

            def with_a_stranger(batch):
                output = told(batch)
                output.cached_requests.append(api.RequestData(5, [1], [], 77, 1))
                return output

            reporter.output = with_a_stranger
            engine.run()
            engine.audit()

    # --- what is handed over

    @pytest.mark.parametrize("kind", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
    @pytest.mark.parametrize("kv", [1, 2])
    def test_a_block_is_opaque(self, start, kind, kv):
        with start(dtype=kind, kv=kv, layers=3) as engine:
            self.seed(engine, prompt(130))
            self.expect_found(engine, prompt(130), 128)

    @pytest.mark.parametrize("bs", [16, 64])
    def test_a_block_may_have_another_size(self, start, bs):
        with start(bs=bs, max_num_tokens=128, chunked=True) as engine:
            self.seed(engine, prompt(200))
            self.expect_found(engine, prompt(200), 192)

    def test_what_was_bound_is_done_once(self, start):
        with start() as engine:
            self.seed(engine, prompt(130))
            self.keep_nothing(engine)
            engine.submit(prompt(160))
            engine.run()
            engine.dummy_pass()
            engine.submit(prompt(200, seed=1), new_tokens=2)
            engine.run()
            engine.audit()

    # --- what makes equal tokens differ

    @pytest.mark.parametrize("what", ["salt", "lora", "media"])
    def test_equal_tokens_may_mean_something_else(self, start, profile, what):
        one, other = {
            "salt": (1, 2) if profile.salt == "cache_salt_id" else ("a", "b"),
            "lora": (1, 2),
            "media": (((3, 20, (1, 2)),), ((3, 20, (1, 3)),)),
        }[what]
        if what == "salt" and not profile.salt:
            one = other = None  # this version has none
        with start() as engine:
            self.seed(engine, prompt(130), **{what: one})
            engine.submit(prompt(130), **{what: other})
            engine.run()
            engine.forget()
            engine.submit(prompt(130), **{what: one})
            engine.run()
            assert queries(engine)[-1] == (0, 128)
            assert (queries(engine)[0] == (0, 0)) == (one != other)
            engine.audit()

    # --- all of it

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("overlap", [False, True])
    def test_anything_may_happen(self, start, seed, overlap):
        chance = random.Random(seed)
        options = {"chunked": seed != 1, "partial": seed == 2, "blocks": 32}
        with start(overlap=overlap, layers=1, max_num_tokens=160, **options) as engine:
            stems = [prompt(chance.choice([31, 64, 96, 130]), stem) for stem in range(3)]
            for _ in range(10):
                tail = prompt(chance.randrange(1, 30), chance.randrange(90, 93))
                stem = chance.choice(stems)
                request = engine.submit((*stem, *tail), new_tokens=chance.randrange(1, 40))
                engine.step(chance.randrange(4))
                if chance.random() < 0.3:
                    engine.cancel(request)
                if chance.random() < 0.2:
                    engine.forget()
            engine.run(400)
            engine.audit()


class ExactSuite:
    """A, B, C and E exactly, of those that can use a part of a chunk and keep no blocks."""

    start = ConnectorSuite.start
    seed = staticmethod(ConnectorSuite.seed)
    expect_found = ConnectorSuite.expect_found

    def test_a_fresh_prompt_to_the_last_call(self, start):
        """A."""
        with start() as engine:
            request = engine.submit(prompt(100), new_tokens=2)
            engine.run()
            blocks = engine.trace.of("update")[0][2]
            hooks = [
                ("hook", method, layer)
                for layer in range(2)
                for method in ("wait_for_layer_load", "save_kv_layer")
            ]
            assert engine.trace.calls == [
                ("query", request.id, 0, 0, False),
                ("update", request.id, blocks),
                ("meta", [(request.id, 100, 4, 0, 100)], []),
                ("load",),
                *hooks,
                ("save",),
                POLL,
                ("meta", [], [(request.id, 1, 0, 100, 1)]),
                ("load",),
                *hooks,
                ("save",),
                ("finished", request.id, blocks, False),
                POLL,
            ]

    @pytest.mark.parametrize("overlap", [False, True])
    def test_an_iteration_ends_with_one_poll(self, start, overlap):
        with start(overlap=overlap) as engine:
            engine.submit(prompt(70), new_tokens=4)
            engine.run()
            assert engine.trace.of("get_finished") == [POLL] * (4 + overlap)

    def test_a_full_hit_uses_half_a_chunk(self, start):
        with start() as engine:
            self.seed(engine, prompt(128))
            engine.submit(prompt(128))
            engine.run()
            assert queries(engine) == [(0, 96)]

    def test_a_load_begins_where_the_device_ends(self, start):
        with start() as engine:
            self.seed(engine, prompt(100))
            engine.submit(prompt(33))
            engine.run()
            engine.clear()
            pool = engine.ranks[0].memory.pools[0]
            engine.hooks.prepared = lambda executor: before.append(pool.view.clone())
            before = []
            request = engine.submit(prompt(100))
            engine.step_until(lambda: reports(engine))
            changed = (pool.view != before[0]).flatten(1).any(1).nonzero().flatten().tolist()
            assert queries(engine) == [(32, 32)]
            assert sorted(changed) == sorted(request.tables[0][1:])

    def test_what_the_device_has_is_stored_too(self, start):
        """E, of a block that the cache has never seen: it held no whole chunk."""
        with start() as engine:
            engine.submit(prompt(40))
            engine.run()
            engine.clear()
            engine.submit(prompt(100))
            engine.run()
            assert queries(engine) == [(32, 0)]
            self.expect_found(engine, prompt(100), 64)


class DescribedSuite:
    """Version 1 of the cache manager may describe its one pool as version 2 does."""

    start = ConnectorSuite.start
    seed = staticmethod(ConnectorSuite.seed)
    expect_found = ConnectorSuite.expect_found

    @pytest.fixture
    def profile(self):
        with standin.installed("main_v1") as profile:
            yield profile

    def test_a_pool_may_be_described(self, start):
        with start(described=True) as engine:
            self.seed(engine, prompt(130))
            self.expect_found(engine, prompt(130), 128)


class OutsideSuite:
    """G, of those that load outside the batch: where a cancelled request keeps its blocks."""

    seed = staticmethod(ConnectorSuite.seed)

    @pytest.fixture(params=["main_v1", "main_v2"])
    def profile(self, request):
        with standin.installed(request.param) as profile:
            yield profile

    @pytest.fixture
    def start(self, profile, plug):
        """An engine with options, whose cache has 128 tokens."""

        def start(**options):
            engine = Engine(profile, plug, **options)
            self.seed(engine, prompt(130))
            return engine

        return start

    def test_a_request_runs_when_its_load_is_over(self, start):
        with start() as engine:
            request = engine.submit(prompt(160))
            engine.step()
            assert [call[:2] for call in engine.trace.without("update")] == [
                ("query", request.id),
                ("meta", []),
                ("load",),
                ("get_finished", []),
            ]
            assert engine.trace.of("query") == [("query", request.id, 0, 128, True)]
            engine.step_until(lambda: not request.is_parked)
            assert [poll[1] for poll in polls(engine) if poll[1]] == [[request.id]]
            assert [poll[3] for poll in polls(engine) if poll[3]] == [[request.id]]
            assert polls(engine)[0][1]
            assert polls(engine)[-1][3]
            engine.clear()
            engine.run()
            assert reports(engine) == [("new", 160, 5, 128, 32)]
            assert engine.trace.count("query") == engine.trace.count("update") == 0
            engine.audit()

    def test_what_the_device_has_is_left_alone(self, start):
        with start() as engine:
            engine.submit(prompt(33))
            engine.run()
            engine.clear()
            engine.submit(prompt(160))
            engine.run()
            assert queries(engine) == [(32, 96)]
            assert reports(engine, raw=True) == [("new", 160, 5, 128, 32)]
            engine.audit()

    def test_others_run_meanwhile(self, start):
        with start() as engine:
            engine.submit(prompt(100, seed=2), new_tokens=40)
            engine.submit(prompt(160))
            engine.run()
            assert reports(engine, raw=True)[0] == ("new", 100, 4, 0, 100)
            assert ("new", 160, 5, 128, 32) in reports(engine, raw=True)[1:]
            assert len(reports(engine)) == 41
            engine.audit()

    def test_blocks_that_a_pass_still_writes_to_are_not_loaded_into(self, start):
        with start(overlap=True, blocks=12) as engine:
            engine.submit(prompt(70, seed=1), new_tokens=9)
            engine.step(2)
            engine.submit(prompt(160), new_tokens=3)
            engine.run()
            engine.audit()

    def test_a_cancelled_load_ends_before_its_blocks_are_freed(self, start):
        with start() as engine:
            request = engine.submit(prompt(160))
            engine.step()
            engine.cancel(request)
            engine.run()
            ends = [call for call in engine.trace.of("get_finished", "finished") if any(call[4:])]
            assert [call[0] for call in ends] == ["get_finished"]
            calls = engine.trace.calls
            assert calls.index(ends[0]) < calls.index(*engine.trace.of("finished"))
            engine.audit()

    def test_a_prefill_in_chunks_follows(self, start, profile):
        with start(chunked=True, max_num_tokens=64) as engine:
            engine.clear()
            engine.submit(prompt(256))
            engine.run()
            first, more = (6, 2) if profile.layouts else (8, 0)
            expected = [("new", 256, first, 128, 64), ("cached", 0, more, 192, 64)]
            assert reports(engine, raw=True) == expected
            engine.audit()

    def test_ranks_wait_for_each_other(self, start):
        with start(ranks=2, layers=1) as engine:
            engine.submit(prompt(160), new_tokens=3)
            engine.run()
            assert reports(engine, raw=True)[0] == ("new", 160, 5, 128, 32)
            engine.audit()


class Version2Suite:
    """What version 2 of the cache manager does besides: K."""

    seed = staticmethod(ConnectorSuite.seed)
    expect_found = ConnectorSuite.expect_found

    @pytest.fixture
    def profile(self, main_v2):
        return main_v2

    @pytest.fixture
    def start(self, profile, plug):
        return lambda **options: Engine(profile, plug, **options)

    @pytest.mark.parametrize("overlap", [False, True])
    def test_a_query_may_come_long_before_its_pass(self, start, overlap):
        with start(overlap=overlap) as engine:
            self.seed(engine, prompt(130))
            engine.submit(prompt(40, seed=1), new_tokens=9)
            engine.step(2)
            engine.clear()
            engine.submit(prompt(160), defer=3)
            engine.run()
            calls = order(engine, "query", "meta", "update")
            assert calls[:6] == ["query", "meta", "meta", "meta", "update", "meta"]
            assert queries(engine) == [(0, 128)]
            assert ("new", 160, 5, 0, 32) in reports(engine)
            engine.audit()

    def test_an_idle_engine_may_wait_too(self, start):
        with start() as engine:
            self.seed(engine, prompt(130))
            engine.submit(prompt(160), defer=2)
            engine.run()
            waits = 2 + len(loaded_outside(engine))
            assert [len(new) for _, new, _ in engine.trace.of("meta")] == [0] * waits + [1]
            engine.audit()

    @pytest.mark.parametrize("use", [0, 64, 96])
    def test_an_offer_may_be_taken_in_part(self, start, use):
        with start() as engine:
            self.seed(engine, prompt(130))
            request = engine.submit(prompt(160), defer=1, use=use)
            engine.run()
            assert engine.trace.of("cancel_load") == [("cancel_load", request.id, use, 128)]
            assert reports(engine) == [("new", 160, 5, 0, 160 - use)]
            engine.audit()

    def test_a_waiting_request_may_be_asked_about_again(self, start):
        with start() as engine:
            self.seed(engine, prompt(130))
            request = engine.submit(prompt(160), defer=2)
            engine.step()
            engine.reset(request)
            engine.run()
            assert order(engine, "query", "reset", "update") == [
                "query",
                "reset",
                "query",
                "update",
            ]
            assert reports(engine) == [("new", 160, 5, 0, 32)]
            engine.audit()

    def test_a_prefill_may_be_replayed(self, start):
        with start(chunked=True, max_num_tokens=64, blocks=16) as engine:
            request = engine.submit(prompt(160))
            engine.step()
            engine.reset(request)
            engine.submit(prompt(100, seed=1), new_tokens=3)
            engine.run()
            assert [call[0] for call in engine.trace.of("query", "reset")][:3] == [
                "query",
                "reset",
                "query",
            ]
            assert [told[0] for told in reports(engine)].count("new") == 3
            engine.audit()

    def test_a_waiting_request_may_be_cancelled(self, start):
        with start() as engine:
            self.seed(engine, prompt(130))
            request = engine.submit(prompt(160), defer=5)
            engine.step(2)
            engine.cancel(request)
            engine.run()
            assert order(engine, "update", "finished") == ["finished"]
            self.expect_found(engine, prompt(160), 128)

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("overlap", [False, True])
    def test_anything_may_happen(self, start, seed, overlap):
        chance = random.Random(seed)
        options = {"chunked": True, "max_num_tokens": 160, "blocks": 40, "layers": 1}
        with start(overlap=overlap, split=seed == 2, **options) as engine:
            for _ in range(10):
                stem = prompt(chance.choice([31, 64, 96, 130]), chance.randrange(3))
                tail = prompt(chance.randrange(1, 30), chance.randrange(90, 93))
                use = chance.choice([None, None, 0, 32, 64])
                about = {"defer": chance.randrange(4), "use": use}
                request = engine.submit((*stem, *tail), new_tokens=chance.randrange(1, 20), **about)
                engine.step(chance.randrange(4))
                if chance.random() < 0.3:
                    engine.cancel(request)
                elif request.is_context and request.is_asked and chance.random() < 0.5:
                    engine.reset(request)
                if chance.random() < 0.3:
                    engine.forget()
            engine.run(400)
            engine.audit()

    def test_a_pool_may_be_many_regions(self, start):
        with start(split=True, layers=3, chunked=True, max_num_tokens=128) as engine:
            engine.submit(prompt(256), new_tokens=3)
            engine.run()
            self.expect_found(engine, prompt(257), 256)
