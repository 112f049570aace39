"""The harness itself, on vLLM without a connector."""

from __future__ import annotations

import time

import pytest

pytestmark = pytest.mark.engine

BLOCKS = 3
LINE = (
    "The keeper of lighthouse number {} wrote down the wind, the tide and every ship that passed. "
)


@pytest.fixture(scope="module")
def engine(start_engine):
    with start_engine(enable_prefix_caching=True, one_process=True) as engine:
        yield engine


def long_prompt(first, engine):
    """Text of more than `BLOCKS` and fewer than twice as many of the engine's blocks."""
    lines = BLOCKS * engine.stats()["block_size"] // 16
    return "".join(LINE.format(number) for number in range(first, first + lines))


def test_greedy_text_is_the_same_again(engine):
    first, second = (
        engine.generate(["The capital of France is"], max_tokens=8)[0] for _ in range(2)
    )
    assert "Paris" in first.text
    assert second.token_ids == first.token_ids


def test_a_prefix_is_reused_until_the_cache_is_reset(engine):
    prompt = long_prompt(100, engine)
    [cold] = engine.generate([prompt], max_tokens=8)
    [warm] = engine.generate([prompt], max_tokens=8)
    engine.reset_prefix_cache()
    [reset] = engine.generate([prompt], max_tokens=8)
    assert (cold.num_cached_tokens, reset.num_cached_tokens) == (0, 0)
    assert warm.num_cached_tokens >= BLOCKS * engine.stats()["block_size"]
    assert cold.text == warm.text == reset.text
    assert warm.ttft_s > 0


def test_token_ids_are_a_prompt_and_batches_keep_their_order(engine):
    completions = engine.generate(
        [list(range(1000, 1020)), "The sky is"], request_ids=["ids", "text"], max_tokens=3
    )
    assert [completion.request_id for completion in completions] == ["ids", "text"]
    assert [len(completion.token_ids) for completion in completions] == [3, 3]


def test_an_aborted_request_is_gone(engine):
    future = engine.submit(["Once upon a time"], request_ids=["long"], max_tokens=3000)
    time.sleep(1)
    engine.abort("long", "unknown")
    [aborted] = engine.complete(future)
    assert aborted.finish_reason == "abort"
    assert len(aborted.token_ids) < 3000
    assert engine.stats()["unfinished"] == 0


def test_an_error_names_its_cause(engine):
    with pytest.raises(RuntimeError, match="max_tokens"):
        engine.generate(["Hello"], max_tokens=-1)
    assert engine.generate(["Hello"], max_tokens=1)[0].finish_reason == "length"


def where_vllm_is(greeting):
    import vllm

    return {"greeting": greeting, "version": vllm.__version__}


def test_a_function_runs_in_a_fresh_process(engine, run_vllm):
    result = run_vllm(where_vllm_is, greeting="hello")
    assert result == {"greeting": "hello", "version": engine.stats()["version"]}


def hang():
    time.sleep(60)


def test_a_child_that_hangs_is_killed(run_vllm):
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="no scenario after 3 s"):
        run_vllm(hang, timeout=3)
    assert time.monotonic() - begin < 30
