"""One request after another: what is stored, what is found again, and that every byte is right."""

from __future__ import annotations

import pytest

PAGE, CHUNK = 4, 16


def whole_pages(length):
    return length - length % PAGE


def hit_of(length):
    """Tokens a warm request of this length loads: whole pages, and one is left to compute."""
    pages = whole_pages(length)
    return pages - (pages == length) if pages else 0


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"])
def test_cold_store_then_warm_hit(make_engine, layout):
    engine = make_engine(layout=layout)
    prompt = range(40, 90)
    assert engine.generate("cold", prompt, max_tokens=5) == 0
    assert engine.generate("warm", prompt, max_tokens=5) == 48
    assert engine.outputs["cold"] == engine.outputs["warm"]
    engine.check_text()
    engine.check_idle()


@pytest.mark.parametrize("length", [1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 47, 48, 49])
def test_lengths_around_pages_and_chunks(engine, length):
    assert engine.generate("cold", range(length)) == 0
    assert engine.stored == whole_pages(length)
    assert engine.generate("warm", range(length)) == hit_of(length)
    assert engine.stored == whole_pages(length)
    engine.check_text()
    engine.check_idle()


def test_a_full_hit_leaves_one_token_to_compute(engine):
    engine.generate("cold", range(64))
    engine.add("warm", range(64))
    scheduled = engine.step()
    assert scheduled.num_scheduled_tokens == {"warm": 1}
    [load] = engine.steps[-1].loads
    assert (load.tokens, load.required, load.total) == (63, 64, 64)
    # the last page is loaded whole, and its last token is computed again
    assert sum(len(move.pages) for move in load.moves) == 16
    engine.run()
    engine.check_text()


def test_a_longer_prompt_loads_what_it_shares(engine):
    engine.generate("short", range(40))
    assert engine.generate("long", range(100)) == 40
    assert engine.stored == 40 + (100 - 32)  # the half chunk is stored again, as a whole one
    assert engine.generate("longer", range(120)) == 100
    engine.check_text()
    engine.check_idle()


def test_the_log_tells_what_was_copied(engine, lines):
    engine.generate("short", range(40))
    engine.generate("long", range(100))
    assert [line[:35] for line in lines.about("Stored")] == [
        "Stored 40 out of total 40 tokens. s",
        "Stored 68 out of total 68 tokens. s",
    ]
    assert len(lines.about("Retrieved 40 out of 40 required tokens (from 100 total")) == 1
    assert lines.about("Reqid") == [
        "Reqid: short, Total tokens 40, LMCache hit tokens: 0, need to load: 0",
        "Reqid: long, Total tokens 100, LMCache hit tokens: 40, need to load: 40",
    ]


def test_another_prompt_shares_only_the_beginning(engine):
    engine.generate("one", [*range(40), 1, 2, 3, 4, *range(40)])
    assert engine.generate("two", [*range(40), 5, 6, 7, 8, *range(40)]) == 32
    assert engine.generate("three", range(1, 60)) == 0
    engine.check_text()


# --- chunked prefill


@pytest.mark.parametrize("budget", [3, 8, 16, 24, 50])
def test_a_prompt_in_pieces_is_stored_whole(make_engine, budget):
    engine = make_engine(budget=budget)
    engine.generate("cold", range(90), max_tokens=3)
    assert engine.stored == 88
    # each chunk as soon as it is complete, the tail with the last piece
    ends = [budget * n for n in range(1, -(-90 // budget) + 1)]
    due = [min(end, 90) // CHUNK - min(end - budget, 90) // CHUNK for end in ends]
    found = [
        sum(move.slot_pages == CHUNK // PAGE for copy in step.stores for move in copy.moves)
        for step in engine.steps[: len(ends)]
    ]
    assert found == due
    assert engine.generate("warm", range(90), max_tokens=3) == 88
    engine.check_text()
    engine.check_idle()


def test_later_pieces_come_as_cached_requests_with_new_blocks_or_none(make_engine):
    engine = make_engine(budget=24)
    engine.add("a", range(46), max_tokens=4)
    first, second, *decodes = [engine.step() for _ in range(5)]
    assert [new.req_id for new in first.scheduled_new_reqs] == ["a"]
    assert second.scheduled_cached_reqs.req_ids == ["a"]
    assert len(second.scheduled_cached_reqs.new_block_ids[0][0]) == 6
    # 48 tokens fit what it has, the 49th needs a page
    assert [s.scheduled_cached_reqs.new_block_ids[0] for s in decodes[:2]] == [None, None]
    assert [len(step.stores) for step in engine.steps] == [1, 1, 0, 0, 0]
    engine.run()
    engine.check_text()


def test_two_requests_of_one_step_store_a_shared_chunk_once(engine):
    engine.add("a", range(24))
    engine.add("b", [*range(16), *range(50, 58)])
    engine.run()
    assert engine.stored == 24 + 8
    engine.check_text()
    engine.check_idle()


# --- what vLLM has itself


@pytest.mark.parametrize("local", [4, 8, 16, 20, 28, 32])
def test_nothing_below_vllms_own_hit_is_written(make_engine, local):
    engine = make_engine(prefix_caching=True)
    engine.generate("cold", range(48))
    engine.scheduler.reset_prefix_cache()
    engine.generate("first pages", range(local + 1))
    engine.add("warm", range(48))
    scheduled = engine.step()
    [new] = scheduled.scheduled_new_reqs
    [load] = engine.steps[-1].loads
    assert new.num_computed_tokens == 47
    assert load.tokens == 47 - local
    written = [page for move in load.moves for page in move.pages]
    assert written == new.block_ids[0][local // PAGE :]
    engine.run()
    engine.check_text()
    engine.check_idle()


def test_vllms_own_hit_needs_no_load(make_engine):
    engine = make_engine(prefix_caching=True)
    engine.generate("cold", range(48))
    assert engine.generate("warm", range(48)) == 3  # of the page that vLLM would compute again
    assert engine.generate("longer", range(60)) == 0
    assert engine.stored == 60 - 48 + 48
    engine.check_text()
    engine.check_idle()


def test_what_vllm_has_and_we_have_not_is_stored(make_engine):
    engine = make_engine(prefix_caching=True)
    engine.generate("cold", range(48))
    engine.cache.decider.clear()
    assert engine.generate("again", range(48)) == 0
    assert engine.stored == 96
    engine.scheduler.reset_prefix_cache()
    assert engine.generate("warm", range(48)) == 47
    engine.check_text()


def test_pages_being_loaded_are_a_prefix_for_others_of_the_same_step(make_engine):
    engine = make_engine(prefix_caching=True)
    engine.generate("cold", range(48))
    engine.scheduler.reset_prefix_cache()
    engine.add("a", range(60))
    engine.add("b", range(54))
    scheduled = engine.step()
    # vLLM counts on what "a" loads, 48 tokens, and on what it computes in this very step
    assert [new.num_computed_tokens for new in scheduled.scheduled_new_reqs] == [48, 52]
    a, b = (new.block_ids[0] for new in scheduled.scheduled_new_reqs)
    assert a[:13] == b[:13]
    assert [copy.request_id for copy in engine.steps[-1].loads] == ["a"]
    engine.run()
    engine.check_text()
    engine.check_idle()


def test_a_hit_that_is_too_short_is_not_loaded(make_engine):
    engine = make_engine(options={"min_retrieve_tokens": 20})
    engine.generate("cold", range(48))
    assert engine.generate("short", [*range(16), *range(60, 70)]) == 0
    assert engine.generate("just", [*range(20), *range(60, 70)]) == 0  # only 16 are a chunk
    assert engine.generate("long", [*range(32), *range(60, 70)]) == 32
    # what was found need not be stored again, loaded or not
    assert engine.stored == 48 + 8 + 12 + 8
    engine.check_text()
    engine.check_idle()


def test_the_minimum_counts_what_vllm_lacks(make_engine):
    engine = make_engine(prefix_caching=True, options={"min_retrieve_tokens": 20})
    engine.generate("cold", range(48))
    engine.scheduler.reset_prefix_cache()
    engine.generate("first pages", range(33))
    assert engine.generate("warm", range(48)) == 0
    engine.check_text()
    engine.check_idle()


# --- repeated questions, ended requests


def test_questions_repeat_until_there_is_room(full_engine, lines):
    engine = full_engine
    for _ in range(5):
        assert "waiting" not in engine.step().num_scheduled_tokens
        assert [lease.owner for lease in engine.cache.decider.leases] == ["waiting"]
    assert len(lines.about("Reqid: waiting")) == 1
    engine.run()
    assert engine.loaded == 99
    assert len(lines.about("Reqid: waiting")) == 1
    engine.check_text()
    engine.check_idle()


def test_an_abort_before_allocation_lets_go(full_engine):
    engine = full_engine
    engine.step()
    assert len(engine.cache.decider.leases) == 1
    engine.abort("waiting")
    assert len(engine.cache.decider.leases) == 0
    engine.run()
    engine.check_text("big")
    engine.check_idle()


def test_an_abort_after_a_step_lets_go(engine):
    engine.generate("cold", range(100))
    engine.add("warm", range(120), max_tokens=20)
    engine.step()
    assert len(engine.cache.decider.leases) == 1
    engine.abort("warm")
    engine.run()
    engine.check_text()
    engine.check_idle()
    assert engine.stored == 100 + 24


def test_an_abort_in_flight_lets_the_copies_land(make_engine):
    engine = make_engine(asynchronous=True)
    engine.generate("cold", range(100))
    engine.add("warm", range(120), max_tokens=20)
    engine.step()
    assert engine.in_flight
    engine.abort("warm")
    assert len(engine.cache.decider.leases) == 1
    engine.run()
    assert engine.generate("again", range(120)) == 119
    engine.check_text()
    engine.check_idle()


def test_an_abort_of_a_request_never_asked_about(engine):
    engine.add("a", range(20))
    engine.abort("a")
    engine.run()
    engine.check_idle()


def test_an_unknown_request_may_finish(engine):
    request = engine.request("nobody", range(20))
    assert engine.impl.request_finished(request, []) == (False, None)
    assert engine.impl.request_finished(request, [1, 2]) == (False, None)
    assert engine.impl.errors == 0


def test_an_id_may_be_used_again(engine):
    engine.generate("a", range(40))
    assert engine.generate("a", range(100, 150)) == 0
    assert engine.generate("a", range(100, 150)) == 48
    assert engine.generate("a", range(40)) == 39
    engine.check_text()
    engine.check_idle()


def test_an_id_may_be_used_again_while_its_last_step_is_in_flight(make_engine):
    engine = make_engine(asynchronous=True)
    engine.add("a", range(40), max_tokens=30)
    engine.step()
    engine.abort("a")
    engine.drain()
    engine.add("a", range(48), max_tokens=2)
    engine.run()
    assert engine.loaded == 40
    engine.check_text()
    engine.check_idle()


def test_empty_steps_do_nothing(engine):
    engine.generate("a", range(40))
    number = engine.steps[0].number
    assert number == 1
    for _ in range(3):
        engine.step()
    assert [step.number for step in engine.steps[1:]] == [0] * (len(engine.steps) - 1)


def test_a_lookup_before_the_store_has_landed_finds_nothing_wrong(make_engine):
    engine = make_engine(asynchronous=True, budget=40)
    engine.add("a", range(40))
    engine.add("b", range(40))
    engine.run()
    assert engine.loaded == 0
    assert engine.stored == 40
    engine.check_text()
    engine.check_idle()
