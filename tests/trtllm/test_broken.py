"""What is wrong with a connector is found, and called by its name."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import pytest
import standin
from driver import Engine, prompt
from judge import ExecutorDied, Violation
from plug import Plug
from suite import queries

ALL = list(standin.PROFILES)
TOLD = ["v1_1", "main_v1", "main_v2"]
UNTOLD = ["v1_2", "v1_3"]
on = pytest.mark.parametrize


def broken(scheduler="Scheduler", worker="Worker"):
    return Plug("broken", scheduler, worker)


def seeded(profile, plug, *prompts, **options):
    """An engine with a cache that has some prompts, and a device that has none."""
    engine = Engine(profile, plug, **options)
    for tokens in prompts:
        engine.submit(tokens)
        engine.run()
    engine.forget()
    return engine


@contextmanager
def caught(engine, rule, kinds=Violation):
    """What ends an engine; what is left in it then says nothing."""
    with pytest.raises(kinds, match=rule):
        yield
    engine.abandon()


def only(*names):
    return on("profile", names, indirect=True)


# --- the mistakes that real connectors have made


def test_a_full_hit_promises_a_token_too_many(profile):
    with seeded(profile, broken("PromisesAll"), prompt(128)) as engine:
        engine.submit(prompt(128))
        with caught(engine, "at-least-one-uncomputed-token: 0 \\+ 128 of 128"):
            engine.run()


def test_a_chunked_prefill_saves_garbage(profile):
    options = {"chunked": True, "max_num_tokens": 128}
    with Engine(profile, broken("SavesThePrompt"), **options) as engine:
        request = engine.submit(prompt(256))
        engine.run()
        if profile.layouts:  # there are no blocks yet to save from
            assert "save" in request.error
            return
        with caught(engine, "content: .* promised positions \\[128, 129, 130\\]"):
            engine.audit()


@only("main_v2")
def test_lookups_are_forgotten_between_query_and_pass(profile):
    with Engine(profile, Plug("minimal")) as engine:
        pass
    with Engine(profile, broken("ForgetsLookups")) as engine:
        store = sys.modules["minimal"].STORE
        engine.submit(prompt(128))
        engine.run()
        engine.forget()
        assert store.chunks
        engine.submit(prompt(160), defer=2)
        with caught(engine, "content: .* promised positions \\[0, 1, 2\\]"):
            engine.run()


def test_what_was_promised_is_evicted(profile):
    with seeded(profile, broken("DoesNotPin", "Hopes"), prompt(128)) as engine:
        store = sys.modules["minimal"].STORE
        engine.hooks.prepared = lambda executor: store.evict()
        engine.submit(prompt(160))
        with caught(engine, "content: .* promised positions"):
            engine.run()


def test_one_rank_has_lost_it(profile):
    plug = broken("LooksAtRankZero", "Hopes")
    with seeded(profile, plug, prompt(128), ranks=2) as engine:
        sys.modules["minimal"].STORE.lose(1)
        engine.submit(prompt(160))
        with caught(engine, "content: rank 1, .* promised positions"):
            engine.run()


def test_blocks_of_the_device_are_written_again(profile):
    with seeded(profile, broken("LoadsFromTheStart"), prompt(130)) as engine:
        engine.submit(prompt(33))
        engine.run()
        engine.submit(prompt(130))
        with caught(engine, "write: .* nobody's to load into"):
            engine.run()


@on("what", ["salt", "lora", "media"])
def test_equal_tokens_that_mean_something_else(profile, what):
    if what == "salt" and not profile.salt:
        what = "lora"  # there is no salt to ignore
    value = ((3, 20, (1, 2)),) if what == "media" else 7
    with seeded(profile, broken("IgnoresIdentity"), prompt(130)) as engine:
        engine.submit(prompt(130), **{what: value})
        with caught(engine, "content: .* promised positions"):
            engine.run()


# --- ids


def test_an_id_is_reported_before_it_is_granted(profile, choose):
    choose(saves_later=True)
    with Engine(profile, broken(worker="ReportsUnasked")) as engine:
        engine.submit(prompt(100), new_tokens=9)
        with caught(engine, "ids: saving 7000001 is reported though it was not pending"):
            engine.run()


def test_an_id_is_reported_twice(profile, choose):
    choose(saves_later=True)
    with Engine(profile, broken(worker="ReportsTwice")) as engine:
        engine.submit(prompt(100))
        with caught(engine, "ids: saving 7000001 is reported"):
            engine.run()
            engine.step()


def test_a_save_is_never_reported(profile, choose):
    choose(saves_later=True)
    with Engine(profile, broken(worker="NeverReports")) as engine:
        engine.submit(prompt(100))
        with caught(engine, "stuck"):
            engine.run(limit=30)


@only("main_v1", "main_v2")
def test_a_load_is_reported_before_it_is_there(profile, choose):
    with seeded(profile, broken(worker="ReportsLoadsAtOnce"), prompt(128)) as engine:
        choose(loads_later=True)
        engine.submit(prompt(160))
        with caught(engine, "content: .* promised positions"):
            engine.run()


@only("main_v1", "main_v2")
def test_a_later_load_is_not_among_the_new_requests(profile, choose):
    with seeded(profile, broken("LoadsWhatIsNew"), prompt(128)) as engine:
        choose(loads_later=True)
        engine.submit(prompt(160))
        with caught(engine, "stuck"):
            engine.run(limit=30)


@only("v1_1", *UNTOLD)
def test_a_later_load_into_blocks_that_a_cancel_freed(profile, choose):
    with seeded(profile, Plug("minimal"), prompt(128)) as engine:
        choose(loads_later=True)
        request = engine.submit(prompt(160))
        engine.step()
        engine.cancel(request)
        engine.run()
        with caught(engine, "write: .*group 0: blocks"):
            engine.finish()


# --- order


def test_a_load_that_no_stream_waits_for(profile):
    with seeded(profile, broken(worker="LoadsOnTheSide"), prompt(128)) as engine:
        engine.submit(prompt(160))
        with caught(engine, "content: .* promised positions \\[0, 1, 2\\]"):
            engine.run()


def test_a_load_that_waits_for_no_pass_before_it(profile):
    options = {"overlap": True, "blocks": 12}
    with seeded(profile, broken(worker="LoadsAtOnce"), prompt(128), **options) as engine:
        engine.submit(prompt(70, seed=1), new_tokens=9)
        engine.step(2)
        engine.submit(prompt(160))
        with caught(engine, "write: .* nobody's to load into"):
            engine.run()


@only("main_v1", "main_v2")
def test_a_load_outside_the_batch_that_waits_for_no_pass_before_it(profile, choose):
    options = {"overlap": True, "blocks": 12}
    with seeded(profile, broken(worker="LoadsOutsideAtOnce"), prompt(128), **options) as engine:
        choose(loads_later=True)
        engine.submit(prompt(70, seed=1), new_tokens=9)
        engine.step(2)
        engine.submit(prompt(160))
        with caught(engine, "write: .*"):
            engine.run()


@only(*ALL[1:])  # the oldest refuses graphs, and calls its hooks always
def test_a_load_that_needs_hooks(profile):
    with seeded(profile, broken(worker="LoadsInHooks"), prompt(128), graphs=True) as engine:
        engine.submit(prompt(160))
        with caught(engine, "content: .* promised positions \\[0, 1, 2\\]"):
            engine.run()


def test_a_save_that_does_not_wait_for_its_pass(profile):
    with Engine(profile, broken(worker="SavesAtOnce")) as engine:
        engine.submit(prompt(128))
        engine.run()
        with caught(engine, "content: .* promised positions \\[0, 1, 2\\]"):
            engine.audit()


@only("v1_1")
def test_saves_that_end_at_once_where_all_but_one_are_forgotten(profile, choose):
    choose(saves_later=True, one_by_one=False)
    with Engine(profile, Plug("minimal")) as engine:
        engine.submit(prompt(128))
        engine.run()  # one at a time is well
        for seed in range(2):
            engine.submit(prompt(128, seed=3 + seed))
        with caught(engine, "ids: .* end at once"):
            engine.run()


@only(*UNTOLD)
def test_a_cancelled_request_is_saved_after_its_blocks_are_freed(profile, choose):
    choose(saves_later=True, stages=False)
    with Engine(profile, Plug("minimal")) as engine:
        engine.submit(prompt(128), new_tokens=2)
        engine.run()
        engine.audit()  # unless something is cancelled under way, this is well
        request = engine.submit(prompt(128, seed=3), new_tokens=9)
        engine.hooks.polling = lambda executor: executor.memory.forget()  # others need the room
        engine.step()
        engine.cancel(request)
        engine.run()
        with caught(engine, "content: .* promised positions \\[0, 1, 2\\]"):
            engine.audit()


@only("v1_1", *UNTOLD, "main_v1")
def test_what_is_kept_for_a_save_is_another_block(profile, choose):
    """What the device had of a prompt it keeps; what the request has computed anew it does not."""
    minimal = choose(saves_later=True, stages=False, polls=4)
    with Engine(profile, Plug("minimal"), blocks=12) as engine:
        engine.submit(prompt(128), new_tokens=2)
        engine.run()
        minimal.STORE.evict()
        engine.submit(prompt(128))
        engine.step()
        assert queries(engine)[-1] == (96, 0)
        engine.submit(prompt(200, seed=1), new_tokens=2)
        engine.run()
        with caught(engine, "content: .* the promised positions \\[96, 97, 98\\]"):
            engine.forget()
            engine.submit(prompt(160))
            engine.run()


def test_a_save_that_holds_up_its_pass(profile, choose):
    choose(saves_later=True)
    with Engine(profile, Plug("minimal", saves_later=True)) as engine:
        engine.submit(prompt(128))
        engine.run()
    plug = Plug("broken", worker="HoldsUpItsPass", saves_later=True)
    with Engine(profile, plug) as engine:
        engine.submit(prompt(128))
        with caught(engine, "blocked: a save waits for its pass"):
            engine.run()


def test_a_write_into_blocks_that_were_freed(profile, choose):
    minimal = choose(stale=[])
    with Engine(profile, broken(worker="WritesLate")) as engine:
        pool = engine.ranks[0].memory.pools[0]
        engine.submit(prompt(100), new_tokens=9)
        engine.step()
        free = engine.ranks[0].memory.blocks[0].free[0]
        minimal.CHOICES.stale.append(lambda: pool.view[free].fill_(1))
        with caught(engine, f"write: .* blocks \\[{free}\\]"):
            engine.run()


def test_a_load_is_done_again(profile):
    with seeded(profile, broken(worker="LoadsAgain"), prompt(130)) as engine:
        engine.submit(prompt(130))
        engine.run()
        engine.forget()
        engine.dummy_pass()
        with caught(engine, "write: "):
            engine.finish()


def test_a_save_is_done_again(profile):
    with Engine(profile, broken(worker="LoadsAgain")) as engine:
        engine.submit(prompt(130))
        engine.run()
        engine.forget()
        sys.modules["minimal"].STORE.lose(0)
        engine.dummy_pass()
        with caught(engine, "content: .* promised positions \\[0, 1, 2\\]"):
            engine.audit()


def test_a_failed_load_is_told_too_late(profile):
    with seeded(profile, broken(worker="RaisesLate"), prompt(128)) as engine:
        engine.hooks.prepared = lambda executor: sys.modules["minimal"].STORE.lose(0)
        engine.submit(prompt(160))
        with caught(engine, "content: .* promised positions \\[0, 1, 2\\]"):
            engine.step()


# --- what it takes for granted


@only("v1_1", "v1_2")
def test_an_address_that_is_not_there(profile):
    with pytest.raises(AttributeError, match="server_url"):
        Engine(profile, broken("NeedsAnAddress"))


@only(*ALL[:-1])
def test_a_pool_without_values(profile):
    with pytest.raises(ExecutorDied, match="register: .*out of bounds"):
        Engine(profile, broken(worker="TakesKeysAndValues"), kv=1)


def test_a_pool_that_cannot_be_exported(profile):
    with pytest.raises(ExecutorDied, match="register: "):
        Engine(profile, broken(worker="ExportsItsPool"))


@on(("scheduler", "found"), [("Scheduler", 128), ("TakesComingForAbsent", 0)])
def test_a_slower_tier(profile, scheduler, found):
    with seeded(profile, broken(scheduler), prompt(130)) as engine:
        sys.modules["minimal"].STORE.doze()
        engine.submit(prompt(130))
        engine.run()
        assert queries(engine)[-1] == (0, found)


@on(("scheduler", "found"), [("Scheduler", 128), ("KeysByPath", 0)])
def test_a_model_in_another_folder(profile, scheduler, found):
    with seeded(profile, broken(scheduler), prompt(130), args={"model": "/one/tiny"}):
        pass
    with Engine(profile, broken(scheduler), args={"model": "/other/tiny"}) as engine:
        engine.submit(prompt(130))
        engine.run()
        assert queries(engine) == [(0, found)]


# --- manners


@on(
    ("scheduler", "rule"),
    [
        ("PromisesHalfABlock", "offer: it ends at 112, within a block"),
        ("PromisesNothingLater", "offer: nothing, but later"),
    ],
)
def test_an_offer_that_is_none(profile, scheduler, rule):
    with seeded(profile, Plug("minimal"), prompt(128)) as engine:
        pass
    with Engine(profile, broken(scheduler)) as engine:
        with caught(engine, rule):
            for _ in range(2):
                engine.submit(prompt(130))
                engine.run()
                engine.forget()


def test_a_request_is_remembered_for_ever(profile):
    with Engine(profile, broken("NeverForgets")) as engine:
        engine.submit(prompt(100))
        engine.run()
        with caught(engine, "leftover: .*NeverForgets.seen"):
            engine.finish()


@only(*UNTOLD)
def test_requests_that_ended_without_a_word_are_remembered(profile, choose):
    choose(states=1000)
    with Engine(profile, Plug("minimal")) as engine:
        for seed in range(17):
            request = engine.submit(prompt(70, seed), new_tokens=9)
            engine.step(2)
            engine.cancel(request)
        with caught(engine, "leftover: 17 silent requests"):
            engine.finish()


def test_metadata_grows_with_what_is_old(profile):
    with Engine(profile, broken("SendsEverything")) as engine:
        with caught(engine, "metadata: .* bytes"):
            for seed in range(30):
                engine.submit(prompt(100, seed), new_tokens=2)
                engine.run()


def test_metadata_cannot_be_sent(profile):
    with Engine(profile, broken("SendsAThread")) as engine:
        engine.submit(prompt(10))
        with caught(engine, "metadata: it cannot be pickled"):
            engine.run()


def test_a_call_takes_long(profile):
    with Engine(profile, broken(worker="WaitsForSaves"), limit_s=0.05) as engine:
        engine.submit(prompt(10))
        with caught(engine, "blocked: get_finished took"):
            engine.run()


def test_an_answer_is_none(profile):
    with Engine(profile, broken(worker="AnswersNone")) as engine:
        engine.submit(prompt(10))
        with caught(engine, "answer: get_finished: None"):
            engine.run()


def test_the_query_looks_at_what_is_not_bound(profile):
    with Engine(profile, broken("LooksBehindTheBinding")) as engine:
        engine.submit(prompt(10))
        with caught(engine, "query: .*no attribute 'py_request_id'", ExecutorDied):
            engine.run()


@on("ranks", [1, 2])
def test_the_leader_waits_for_its_ranks(profile, ranks):
    with Engine(profile, broken("AsksItsRanks"), ranks=ranks, patience_s=1) as engine:
        engine.submit(prompt(10))
        with caught(engine, "dead-lock"):
            engine.run()


def test_one_rank_waits_for_the_others(profile):
    with Engine(profile, broken(worker="TalksAlone"), ranks=2, patience_s=1) as engine:
        engine.submit(prompt(10))
        with caught(engine, "dead-lock: ranks are out of step: \\['broadcast', "):
            engine.run()
