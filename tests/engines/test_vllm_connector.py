"""The in-process connector in a real vLLM: every answer must be what it is without a cache."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from harness import story
from ports import free_port

pytestmark = pytest.mark.engine

TRANSFER = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "lmcache-sqlite"
PAGE = 128
CHUNK = 256


def metrics(engine, port):
    """Sums of LMCache's counters and gauges, by name."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
            text = page.read().decode()
    except TimeoutError:
        pytest.fail(engine.autopsy())
    found = re.findall(r"^lmcache_(\w+?)(?:_total)?\{[^}]*\} (\S+)$", text, re.MULTILINE)
    sums = {}
    for name, value in found:
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def settled(engine, port):
    """The metrics once a last request has let every copy of the ones before it be accounted."""
    engine.generate(["Hello"], max_tokens=2)
    return metrics(engine, port)


@pytest.fixture(scope="module")
def port():
    return free_port()


@pytest.fixture(scope="module")
def engine(start_engine, port):
    """Scheduler and worker in two processes; prompts are prefilled in several steps."""
    env = {"LMCACHE_MAX_LOCAL_CPU_SIZE": "1", "LMCACHE_METRICS_PORT": str(port)}
    with start_engine(kv_transfer_config=TRANSFER, max_num_batched_tokens=512, env=env) as engine:
        yield engine


def tokens_of(engine, prompt):
    """The prompt's length as the connector logged it at its last lookup."""
    lines = re.findall(r"Total tokens (\d+), LMCache hit tokens: (\d+)", engine.log.read_text())
    return int(lines[-1][0])


def test_a_second_request_is_loaded_and_answers_the_same(engine):
    prompt = story(1, 1400)
    [cold] = engine.generate([prompt], max_tokens=12)
    length = tokens_of(engine, prompt)
    [warm] = engine.generate([prompt], max_tokens=12)
    assert cold.num_cached_tokens == 0
    assert warm.num_cached_tokens == (length - 1) // PAGE * PAGE > 0
    assert warm.text == cold.text


def test_the_log_says_what_people_grep_for(engine):
    prompt = story(2, 700)
    for _ in range(2):
        engine.generate([prompt], max_tokens=2)
    text = engine.log.read_text()
    assert re.search(
        r"LMCache INFO: Stored \d+ out of total \d+ tokens\. size: [\d.]+ gb, cost ", text
    )
    assert re.search(
        r"Reqid: \S+, Total tokens \d+, LMCache hit tokens: \d+, need to load: \d+", text
    )
    assert re.search(r"Retrieved \d+ out of \d+ required tokens \(from \d+ total tokens\)", text)


def test_a_shared_prefix_is_loaded_up_to_where_prompts_part(engine):
    prefix = story(3, 1200)
    [cold] = engine.generate([prefix + " asleep. Was he?"], max_tokens=2)
    [partly] = engine.generate([prefix + " awake all night. Why?"], max_tokens=8)
    [again] = engine.generate([prefix + " awake all night. Why?"], max_tokens=8)
    assert cold.num_cached_tokens == 0
    assert partly.num_cached_tokens > 0
    assert partly.num_cached_tokens % PAGE == 0
    assert again.text == partly.text


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_prompts_about_a_page_boundary(engine, extra):
    ids = list(range(5000, 5000 + 3 * PAGE + extra))
    [cold] = engine.generate([ids], max_tokens=4)
    [warm] = engine.generate([ids], max_tokens=4)
    # vLLM computes at least one token: a prompt of whole pages is loaded but for its last token
    assert warm.num_cached_tokens == {-1: 2 * PAGE, 0: 3 * PAGE - 1, 1: 3 * PAGE}[extra]
    assert warm.token_ids == cold.token_ids


def test_requests_that_run_together(engine):
    prompts = [story(number, 500) for number in range(10, 16)]
    cold = engine.generate(prompts, max_tokens=8)
    warm = engine.generate(prompts, max_tokens=8)
    assert all(request.num_cached_tokens > 0 for request in warm)
    assert [request.text for request in warm] == [request.text for request in cold]


def test_aborts_leave_nothing_behind(engine, port):
    prompts = [story(number, 1500) for number in range(20, 24)]
    for number, prompt in enumerate(prompts * 2):
        future = engine.submit([prompt], request_ids=[f"gone-{number}"], max_tokens=40)
        time.sleep(0.1 + 0.15 * number)
        engine.abort(f"gone-{number}")
        engine.complete(future)
    reference = engine.generate(prompts, max_tokens=8)
    warm = engine.generate(prompts, max_tokens=8)
    assert [request.text for request in warm] == [request.text for request in reference]
    assert settled(engine, port)["leases"] == 0


def test_salts_do_not_share(engine):
    prompt = story(30, 600)
    one = {"prompt": prompt, "cache_salt": "one"}
    engine.generate([one], max_tokens=2)
    [other] = engine.generate([{"prompt": prompt, "cache_salt": "two"}], max_tokens=2)
    [same] = engine.generate([one], max_tokens=2)
    assert other.num_cached_tokens == 0
    assert same.num_cached_tokens > 0


def test_counters_add_up(engine, port):
    before = settled(engine, port)
    prompt = story(40, 800)
    engine.generate([prompt], max_tokens=2)
    [warm] = engine.generate([prompt], max_tokens=2)
    after = settled(engine, port)
    assert after["stored_tokens"] - before["stored_tokens"] == warm.num_cached_tokens
    assert after["hit_tokens"] - before["hit_tokens"] == warm.num_cached_tokens
    assert after["load_failures"] == after["store_failures"] == 0


@pytest.fixture(scope="module")
def small(start_engine):
    """Scheduler and worker in one process, vLLM's own prefix cache on, and a slab of 64 MB."""
    env = {"LMCACHE_MAX_LOCAL_CPU_SIZE": "0.06", "LMCACHE_CHUNK_SIZE": "128"}
    with start_engine(
        kv_transfer_config=TRANSFER, enable_prefix_caching=True, env=env, one_process=True
    ) as engine:
        yield engine


def test_four_times_more_than_the_slab_holds(small):
    prompts = [story(number, 900) for number in range(50, 62)]
    reference = [small.generate([prompt], max_tokens=6)[0].text for prompt in prompts]
    order = list(range(len(prompts))) * 2
    random.Random(0).shuffle(order)
    cached = 0
    for i in order:
        small.reset_prefix_cache()
        [warm] = small.generate([prompts[i]], max_tokens=6)
        assert warm.text == reference[i]
        cached += warm.num_cached_tokens
    assert cached > 0


def test_only_what_vllm_lacks_is_loaded(small):
    head, prompt = story(70, 400), story(70, 400) + story(71, 400)
    [cold] = small.generate([prompt], max_tokens=6)
    small.reset_prefix_cache()
    small.generate([head], max_tokens=1)
    [warm] = small.generate([prompt], max_tokens=6)
    load = re.findall(r"hit tokens: (\d+), need to load: (\d+)", small.log.read_text())[-1]
    assert warm.text == cold.text
    assert 0 < int(load[1]) < int(load[0]) == warm.num_cached_tokens


def damaged(model):
    """Cold, then warm with every slot damaged, then warm again; all in one process."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    from lmcache.adapters.vllm.live import LIVE
    from lmcache.core.objects import HEADER_BYTES, TAGS
    from lmcache.integration.vllm.utils import ENGINE_NAME
    from lmcache.v1.cache_engine import LMCacheEngineBuilder

    llm = LLM(
        model=model,
        max_model_len=2048,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_transfer_config=KVTransferConfig(**TRANSFER, kv_load_failure_policy="recompute"),
    )
    params = SamplingParams(temperature=0, max_tokens=8)

    def ask():
        [output] = llm.generate([story(80, 700)], params, use_tqdm=False)
        return [output.outputs[0].text, output.outputs[0].finish_reason, output.num_cached_tokens]

    answers = [ask(), ask()]
    cache = next(c._scheduler._cache for c in LIVE if c._scheduler)
    index = cache.decider._index
    for entry, key in enumerate(index.keys):
        if key:
            start = index.offset[entry]
            tags = slice(start + TAGS, start + HEADER_BYTES)
            cache.decider.slab.view[tags] = bytes(HEADER_BYTES - TAGS)
    answers += [ask(), ask()]
    failures = cache.decider.counters["load_failures"]
    leases = len(cache.decider.leases)
    LMCacheEngineBuilder.destroy(ENGINE_NAME)
    answers.append(ask())
    return {"answers": answers, "failures": failures, "leases": leases}


def test_a_failed_load_is_recomputed(run_vllm, model_dir):
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "LMCACHE_MAX_LOCAL_CPU_SIZE": "1"}
    result = run_vllm(damaged, env=env, model=str(model_dir))
    texts = {text for text, _, _ in result["answers"]}
    cold, warm, _, again, destroyed = (cached for _, _, cached in result["answers"])
    assert len(texts) == 1
    assert cold == destroyed == 0
    assert warm == again > 0
    assert result["failures"] == -(-warm // CHUNK)
    assert result["leases"] == 0


def without_worker(model):
    """The worker cannot make sense of the pages: vLLM must serve as if we were not there."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    from lmcache.adapters.vllm import grants
    from lmcache.adapters.vllm.live import LIVE
    from lmcache.core.errors import LayoutError

    def refuse(*_):
        raise LayoutError("a layout nobody knows")

    grants.layout_of = refuse
    llm = LLM(
        model=model,
        max_model_len=2048,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_transfer_config=KVTransferConfig(**TRANSFER),
    )
    scheduler = next(c._scheduler for c in LIVE if c._scheduler)
    slowest = 0.0
    matched = scheduler.matched_tokens

    def timed(request, local):
        nonlocal slowest
        begin = time.perf_counter()
        answer = matched(request, local)
        slowest = max(slowest, time.perf_counter() - begin)
        return answer

    scheduler.matched_tokens = timed
    params = SamplingParams(temperature=0, max_tokens=4)
    outputs = [llm.generate([story(90, 500)], params, use_tqdm=False)[0] for _ in range(2)]
    return {
        "texts": [output.outputs[0].text for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
        "slowest_lookup_s": slowest,
    }


def test_a_worker_that_cannot_start_costs_nothing(run_vllm, model_dir):
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    result = run_vllm(without_worker, env=env, model=str(model_dir))
    assert result["texts"][0] == result["texts"][1] != ""
    assert result["cached"] == [0, 0]
    assert result["slowest_lookup_s"] < 0.02


@pytest.fixture(params=["disk", "third-party"])
def tier(request, tmp_path):
    """Environment that gives the cache a tier which outlives the engine."""
    if request.param == "disk":
        return {"LMCACHE_LOCAL_DISK": str(tmp_path / "kv"), "LMCACHE_MAX_LOCAL_DISK_SIZE": "2"}
    site = tmp_path / "site"
    source = shutil.copytree(EXAMPLE, tmp_path / "source")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", "--quiet", *offline]
    subprocess.run([*command, "--target", site, source], check=True, timeout=120)
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "LMCACHE_L2": f"sqlite://{tmp_path}/kv.db"}


def test_chunks_in_a_tier_survive_a_killed_engine(start_engine, tier):
    prompt = story(100, 1000)
    answers = []
    for seed in ("1", "2"):  # keys must not depend on it
        port = free_port()
        env = {"LMCACHE_METRICS_PORT": str(port), "PYTHONHASHSEED": seed, **tier}
        engine = start_engine(kv_transfer_config=TRANSFER, env=env, one_process=True)
        try:
            answers += engine.generate([prompt], max_tokens=8)
            deadline = time.monotonic() + 30
            while len(answers) == 1 and time.monotonic() < deadline:
                found = settled(engine, port)
                if found["tier_written"] * CHUNK >= found["stored_tokens"] > 0:
                    break
                time.sleep(0.1)
            dropped = metrics(engine, port)["tier_dropped"]
        finally:
            engine._child.kill()
        assert dropped == 0
    cold, warm = answers
    assert cold.num_cached_tokens == 0
    assert warm.num_cached_tokens > 0
    assert warm.text == cold.text
    assert not [name for name in os.listdir("/dev/shm") if "lmcache" in name]
