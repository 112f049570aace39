"""Requests that lose their pages and come back, in the form each of vLLM's model runners knows."""

from __future__ import annotations

import pytest

runners = pytest.mark.parametrize("second_runner", [False, True], ids=["MRV1", "MRV2"])


def preempt_all(engine):
    """vLLM preempts what runs when its prefix cache is reset by force."""
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)


@runners
@pytest.mark.parametrize("decode", [False, True])
def test_a_request_comes_back_with_what_was_stored(make_engine, second_runner, decode):
    engine = make_engine(second_runner=second_runner, options={"save_decode_cache": decode})
    engine.add("a", range(50), max_tokens=40)
    for _ in range(24):
        engine.step()
    preempt_all(engine)
    scheduled = engine.step()
    known = 50 + 24
    found = known // 16 * 16 if decode else 48
    if second_runner:
        [back] = scheduled.scheduled_new_reqs
        assert (back.req_id, back.num_computed_tokens) == ("a", found)
        assert list(range(50)) == back.prefill_token_ids[:50] == back.prompt_token_ids
    else:
        assert scheduled.scheduled_cached_reqs.resumed_req_ids == {"a"}
        assert scheduled.scheduled_cached_reqs.num_computed_tokens == [found]
    [load] = engine.steps[-1].loads
    assert load.tokens == found
    engine.run()
    engine.check_text()
    engine.check_idle()


@runners
def test_a_request_comes_back_in_the_middle_of_its_prompt(make_engine, second_runner):
    engine = make_engine(second_runner=second_runner, budget=24)
    engine.add("a", range(100), max_tokens=4)
    engine.step()
    engine.step()
    preempt_all(engine)
    engine.run()
    assert engine.loaded == 48
    assert engine.stored == 100
    assert engine.generate("again", range(100), max_tokens=4) == 99
    engine.check_text()
    engine.check_idle()


@runners
def test_a_request_comes_back_before_its_store_was_settled(make_engine, second_runner):
    engine = make_engine(second_runner=second_runner)
    engine.add("a", range(60), max_tokens=4)
    engine.step()
    preempt_all(engine)
    scheduled = engine.step()
    assert scheduled.num_scheduled_tokens == {"a": 61 - 60}
    engine.run()
    engine.check_text()
    engine.check_idle()


@runners
def test_a_request_comes_back_twice(make_engine, second_runner):
    engine = make_engine(second_runner=second_runner)
    engine.add("a", range(50), max_tokens=40)
    for _ in range(2):
        for _ in range(5):
            engine.step()
        preempt_all(engine)
    engine.run()
    assert engine.loaded == 96
    engine.check_text()
    engine.check_idle()


@runners
def test_a_request_comes_back_after_its_chunks_were_dropped(make_engine, second_runner):
    engine = make_engine(second_runner=second_runner)
    engine.add("a", range(50), max_tokens=20)
    for _ in range(5):
        engine.step()
    preempt_all(engine)
    engine.cache.decider.clear()
    engine.run()
    assert engine.loaded == 0
    assert engine.stored == 96
    engine.check_text()
    engine.check_idle()


@runners
@pytest.mark.parametrize("scheduling", ["fcfs", "priority"])
@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_too_few_pages_for_all(
    make_engine, second_runner, scheduling, prefix_caching, asynchronous
):
    engine = make_engine(
        pages=70,
        asynchronous=asynchronous,
        second_runner=second_runner,
        scheduling=scheduling,
        prefix_caching=prefix_caching,
        options={"save_decode_cache": True},
    )
    for number in range(5):
        prompt = [*range(16), *range(100 * number, 100 * number + 44)]
        engine.add(str(number), prompt, max_tokens=40, priority=number % 3)
    engine.run()
    assert any(request.num_preemptions for request in engine.requests.values())
    engine.check_text()
    engine.check_idle()


@runners
def test_an_abort_between_preemption_and_return(make_engine, second_runner):
    engine = make_engine(second_runner=second_runner, pages=66)
    engine.add("a", range(50), max_tokens=40)
    engine.step()
    preempt_all(engine)
    engine.add("big", range(300, 500), max_tokens=2, priority=-1)
    # found and leased, but aborted before a step carries the load
    request = engine.requests["a"]
    assert engine.impl.get_num_new_matched_tokens(request, 0) == 48
    assert len(engine.cache.decider.leases) == 1
    engine.abort("a")
    assert len(engine.cache.decider.leases) == 0
    engine.run()
    engine.check_text("big")
    engine.check_idle()
