"""The minimal connector keeps the contract, with every version."""

from __future__ import annotations

import sys

import pytest
from driver import Engine, prompt
from judge import ExecutorDied
from plug import Plug
from suite import (
    ConnectorSuite,
    DescribedSuite,
    ExactSuite,
    OutsideSuite,
    Version2Suite,
    polls,
    queries,
)

IDS = (7_000_001, 7_007_920)


@pytest.fixture
def plug(profile):
    return Plug("minimal")


class TestMinimal(ConnectorSuite):
    pass


class TestMinimalExactly(ExactSuite):
    pass


class TestMinimalDescribed(DescribedSuite):
    pass


class TestMinimalThatSavesLater(ConnectorSuite):
    @pytest.fixture(autouse=True)
    def saves_later(self, choose):
        choose(saves_later=True)


class TestMinimalOnVersion2(Version2Suite):
    pass


class TestLaterSaves:
    """F."""

    @pytest.mark.parametrize("stages", [True, False])
    def test_blocks_stay_until_the_save_is_over(self, profile, plug, choose, stages):
        choose(saves_later=True, stages=stages, polls=4)
        with Engine(profile, plug, blocks=12) as engine:
            engine.hooks.polling = lambda executor: executor.memory.forget()
            engine.submit(prompt(128))
            engine.step()
            assert engine.trace.calls[-1] == ("get_finished", [IDS[0]], [], [], [])
            blocks = engine.ranks[0].memory.blocks[0]
            assert sum(blocks.holders) == 4
            engine.submit(prompt(200, seed=1), new_tokens=2)
            engine.run()
            assert polls(engine)[:4] == [
                ([IDS[0]], [], [], []),
                ([], [], [], []),
                ([IDS[1]], [], [], []),
                ([], [], [IDS[0]], []),
            ]
            assert sum(blocks.holders) == 0
            engine.audit()

    def test_what_is_not_under_way_is_reported_at_once(self, profile, plug, choose):
        choose(saves_later=True, polls=1)
        with Engine(profile, plug) as engine:
            engine.submit(prompt(128), new_tokens=4)
            engine.run()
            assert polls(engine)[-1] == ([IDS[0]], [], [IDS[0]], [])

    def test_a_cancel_changes_nothing_about_a_save(self, profile, plug, choose):
        choose(saves_later=True)
        with Engine(profile, plug) as engine:
            request = engine.submit(prompt(128))
            engine.step()
            engine.cancel(request)
            engine.run()
            assert polls(engine)[-1] == ([], [], [IDS[0]], [])
            assert engine.trace.count("finished") == 1
            engine.audit()

    def test_a_cancelled_request_keeps_what_is_being_saved(self, profile, plug, choose):
        # where nobody tells of a cancel, a save must have its own copy
        choose(saves_later=True, stages=not profile.tells_of_cancels, polls=4)
        with Engine(profile, plug) as engine:
            engine.hooks.polling = lambda executor: executor.memory.forget()
            request = engine.submit(prompt(128), new_tokens=9)
            engine.step()
            engine.cancel(request)
            engine.step()
            kept = sum(engine.ranks[0].memory.blocks[0].holders)
            assert kept == (5 if profile.layouts else 4 * profile.tells_of_cancels)
            engine.step(4)
            engine.forget()
            engine.submit(prompt(160))
            engine.run()
            assert queries(engine)[-1] == (0, 128)
            engine.audit()

    def test_one_save_an_iteration_ends_in_the_oldest_version(self, profile, plug, choose):
        choose(saves_later=True, polls=5)
        with Engine(profile, plug) as engine:
            for seed in range(2):
                engine.submit(prompt(128, seed))
            engine.run()
            told = [poll[2] for poll in polls(engine) if poll[2]]
            assert told == ([[each] for each in IDS] if profile.one_release else [list(IDS)])

    def test_without_block_reuse_nothing_is_kept(self, profile, plug, choose):
        if profile.main:
            with pytest.raises(ValueError, match="needs block reuse"):
                Engine(profile, plug, reuse=False)
            return
        choose(saves_later=True, stages=False)
        with Engine(profile, plug, reuse=False) as engine:
            engine.submit(prompt(128))
            engine.run()
            # what is not asked for is not known, and so not saved
            assert [call[-1] for call in engine.trace.of("finished")] == [False]


class TestMinimalOutside(OutsideSuite):
    @pytest.fixture(autouse=True)
    def loads_later(self, choose):
        choose(loads_later=True)


class TestRanks:
    """I."""

    def test_a_slow_rank_holds_up_the_others(self, profile, plug, choose):
        choose(saves_later=True, polls=1, slow={1: 2})
        with Engine(profile, plug, ranks=2) as engine:
            engine.submit(prompt(128))
            engine.step()
            held = []
            for _ in range(3):
                held.append(bool(engine.ranks[0].saving))
                engine.step()
            engine.run()
            told = [[bool(poll[2]) for poll in polls(engine, rank)] for rank in range(2)]
            late = [each.index(True) for each in told]
            assert late[1] == late[0] + 2
            assert held[late[1] - 1] is True
            assert not engine.ranks[0].saving

    def test_what_one_rank_lacks_is_not_there(self, profile, plug):
        with Engine(profile, plug, ranks=2) as engine:
            engine.submit(prompt(130))
            engine.run()
            engine.forget()
            sys.modules["minimal"].STORE.lose(1)
            engine.submit(prompt(130))
            engine.run()
            assert queries(engine) == [(0, 0), (0, 0)]
            engine.audit()

    def test_a_load_that_fails_on_one_rank_stops_all(self, profile, plug):
        with Engine(profile, plug, ranks=2) as engine:
            engine.submit(prompt(130))
            engine.run()
            engine.forget()
            engine.hooks.prepared = lambda executor: sys.modules["minimal"].STORE.lose(1)
            engine.submit(prompt(130))
            with pytest.raises(ExecutorDied, match="rank 1, load: .*promised is gone"):
                engine.run()
            [request] = engine.ranks[1].requests
            assert request.tokens == list(prompt(130))
            engine.abandon()

    def test_four_ranks_keep_step(self, profile, plug):
        with Engine(profile, plug, ranks=4, layers=1, overlap=True) as engine:
            for seed in range(3):
                engine.submit(prompt(130, seed), new_tokens=3)
            engine.run()
            engine.audit()
            calls = [rank.manager.trace.without("get_finished") for rank in engine.ranks]
            assert calls == [calls[0]] * 4


class TestPins:
    def test_what_was_promised_is_kept(self, profile, plug):
        with Engine(profile, plug) as engine:
            engine.submit(prompt(130))
            engine.run()
            engine.forget()
            store = sys.modules["minimal"].STORE
            engine.hooks.prepared = lambda executor: store.evict()
            engine.submit(prompt(160), new_tokens=3)
            engine.run()
            assert queries(engine)[-1] == (0, 128)
            assert not store.pinned
            engine.step()
            store.evict()
            assert not store.chunks


class TestGroups:
    """Layers with windows, which version 2 alone has."""

    @pytest.fixture
    def profile(self, main_v2):
        return main_v2

    @pytest.mark.parametrize("windows", [(None, 64), (64,), (64, None), (None, None)])
    @pytest.mark.parametrize("chunked", [True, False])
    def test_each_group_has_its_blocks(self, profile, plug, windows, chunked):
        options = {"chunked": chunked, "max_num_tokens": 128 if chunked else 512}
        with Engine(profile, plug, windows=windows, layers=4, **options) as engine:
            request = engine.submit(prompt(257), new_tokens=40)
            engine.run()
            engine.clear()
            engine.submit(prompt(257))
            engine.run()
            assert queries(engine) == [(0, 256)]
            tables = engine.trace.of("update")[0][2:]
            for window, table in zip(windows, tables, strict=True):
                gone = 0 if window is None else (256 - window + 1) // 32
                assert [block == -1 for block in table] == [True] * gone + [False] * (9 - gone)
            assert request.error is None
            engine.audit()

    def test_a_group_that_lacks_it_counts_for_all(self, profile, plug):
        with Engine(profile, plug, windows=(None, 64), layers=4) as engine:
            engine.submit(prompt(257))
            engine.run()
            store = sys.modules["minimal"].STORE
            third = list(store.chunks)[2 * 2 + 1]
            assert third[:2] == (0, 1)
            del store.chunks[third]
            engine.submit(prompt(257))
            engine.run()
            assert queries(engine)[-1] == (0, 128)
            engine.audit()

    def test_flat_methods_know_one_group(self, profile):
        plug = Plug("broken", "KnowsOneGroup")
        with Engine(profile, plug, windows=(None, 64), layers=4) as engine:
            engine.submit(prompt(100))
            with pytest.raises(ExecutorDied, match="one group of layers"):
                engine.run()
            engine.abandon()
