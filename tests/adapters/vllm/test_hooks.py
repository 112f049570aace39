"""The scheduling hooks one by one, in the orders and with the arguments vLLM allows itself."""

from __future__ import annotations

import pytest


@pytest.fixture
def warm(make_engine):
    """An engine that has 48 tokens stored."""
    engine = make_engine()
    engine.generate("cold", range(48))
    return engine


def scheduled(engine, request, computed, count, pages=None):
    """The step in which vLLM admits a request, with these tokens already in its pages."""
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

    request.num_computed_tokens = computed
    table = pages or list(range(20, 20 + -(-request.num_tokens // 4)))
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = [NewRequestData.from_request(request, (table,))]
    output.num_scheduled_tokens = {request.request_id: count}
    output.total_num_scheduled_tokens = count
    return output


def idle(engine):
    from vllm.v1.core.sched.output import SchedulerOutput

    return SchedulerOutput.make_empty()


def execute(engine, step):
    """What a worker does with a step, without a forward pass."""
    worker = engine.ranks[0].connector
    worker.bind_connector_metadata(step)
    worker.start_load_kv(None)
    worker.wait_for_save()
    failed = worker.get_block_ids_with_load_errors()
    worker.clear_connector_metadata()
    return failed


@pytest.mark.parametrize("external", [1, 3, 4, 15, 16, 17, 40, 47, 48])
def test_vllm_may_load_fewer_tokens_than_it_could(warm, external):
    request = warm.request("a", range(60))
    assert warm.impl.get_num_new_matched_tokens(request, 0) == 48
    warm.impl.update_state_after_alloc(request, external)
    step = warm.impl.build_connector_meta(scheduled(warm, request, external, 60 - external))
    [load] = step.loads
    pages = [page for move in load.moves for page in move.pages]
    assert pages == list(range(20, 20 + -(-external // 4)))
    assert step.lost == []
    # known to be stored, loaded or not
    assert [copy.tokens for copy in step.stores] == [12]
    assert execute(warm, step) == set()
    warm.impl.build_connector_meta(idle(warm))
    warm.impl.request_finished(request, [])
    warm.check_idle()


def test_vllm_may_load_nothing(warm):
    request = warm.request("a", range(60))
    assert warm.impl.get_num_new_matched_tokens(request, 0) == 48
    warm.impl.update_state_after_alloc(request, 0)
    assert len(warm.cache.decider.leases) == 0
    step = warm.impl.build_connector_meta(scheduled(warm, request, 0, 60))
    assert (step.loads, step.lost) == ([], [])
    execute(warm, step)
    warm.impl.build_connector_meta(idle(warm))
    warm.impl.request_finished(request, [])
    warm.check_idle()


@pytest.mark.parametrize("counts", [(48, 48), (0, 0), (48, 0), (0, 48)])
def test_vllm_may_tell_of_an_allocation_twice(warm, counts):
    request = warm.request("a", range(60))
    assert warm.impl.get_num_new_matched_tokens(request, 0) == 48
    for count in counts:
        warm.impl.update_state_after_alloc(request, count)
    step = warm.impl.build_connector_meta(scheduled(warm, request, counts[-1], 60 - counts[-1]))
    loaded = {page for move in step.all_loads() for page in move.pages}
    wanted = set(range(20, 32)) if counts[-1] else set()
    # what it counts on is loaded, or it is told that it is not
    assert loaded | set(step.lost) == wanted
    execute(warm, step)
    warm.impl.build_connector_meta(idle(warm))
    warm.impl.request_finished(request, [])
    warm.check_idle()


def test_a_question_may_be_repeated_with_another_local_hit(warm):
    request = warm.request("a", range(60))
    for local, need in ((0, 48), (16, 32), (20, 28), (48, 0), (52, 0), (4, 44)):
        assert warm.impl.get_num_new_matched_tokens(request, local) == need
        assert len(warm.cache.decider.leases) == 1
    warm.impl.update_state_after_alloc(request, 44)
    step = warm.impl.build_connector_meta(scheduled(warm, request, 48, 12))
    assert [page for move in step.all_loads() for page in move.pages] == list(range(21, 32))
    execute(warm, step)
    warm.impl.build_connector_meta(idle(warm))
    warm.impl.request_finished(request, [])
    warm.check_idle()


def test_a_question_without_an_allocation_leaves_nothing(warm):
    request = warm.request("a", range(60))
    warm.impl.get_num_new_matched_tokens(request, 0)
    step = warm.impl.build_connector_meta(idle(warm))
    assert (step.number, step.lost) == (0, [])
    warm.impl.request_finished(request, [])
    warm.check_idle()


def test_a_lease_that_expires_before_the_allocation_is_a_lost_load(warm):
    request = warm.request("a", range(60))
    assert warm.impl.get_num_new_matched_tokens(request, 0) == 48
    decider = warm.cache.decider
    real = decider._clock
    decider._clock = lambda: real() + 1000.0
    with decider.lock:
        decider._expire()
    decider.clear()
    warm.impl.update_state_after_alloc(request, 48)
    step = warm.impl.build_connector_meta(scheduled(warm, request, 48, 12))
    assert step.loads == []
    assert step.lost == list(range(20, 32))
    assert execute(warm, step) == set(range(20, 32))
    warm.impl.build_connector_meta(idle(warm))
    # what was computed from pages without content was not stored
    assert len(decider) == 0
    warm.impl.request_finished(request, [])
    warm.check_idle()


def test_an_abort_between_allocation_and_step(warm):
    request = warm.request("a", range(60))
    warm.impl.get_num_new_matched_tokens(request, 0)
    warm.impl.update_state_after_alloc(request, 48)
    warm.impl.request_finished(request, [])
    step = warm.impl.build_connector_meta(idle(warm))
    assert (step.number, step.loads, step.lost) == (0, [], [])
    warm.check_idle()


def test_a_request_that_grew_between_questions_is_one_hit(warm):
    request = warm.request("a", range(48))
    assert warm.impl.get_num_new_matched_tokens(request, 0) == 47
    request.append_output_token_ids(7)
    assert warm.impl.get_num_new_matched_tokens(request, 0) == 48
    assert len(warm.cache.decider.leases) == 1
    warm.impl.request_finished(request, [])
    warm.check_idle()


def test_allocations_of_unknown_requests_are_ignored(warm):
    request = warm.request("nobody", range(60))
    warm.impl.update_state_after_alloc(request, 0)
    step = warm.impl.build_connector_meta(scheduled(warm, request, 0, 60))
    assert (step.number, step.loads, step.stores, step.lost) == (0, [], [], [])
    assert warm.impl.errors == 0
    warm.check_idle()


def test_a_schedule_is_not_changed(warm):
    import copy

    request = warm.request("a", range(60))
    warm.impl.get_num_new_matched_tokens(request, 0)
    warm.impl.update_state_after_alloc(request, 48)
    output = scheduled(warm, request, 48, 12)
    before = copy.deepcopy(output.scheduled_new_reqs[0].block_ids)
    step = warm.impl.build_connector_meta(output)
    assert output.scheduled_new_reqs[0].block_ids == before
    # nor does the step share a list with it
    assert all(
        move.pages is not output.scheduled_new_reqs[0].block_ids[0] for move in step.all_loads()
    )
    execute(warm, step)
    warm.impl.build_connector_meta(idle(warm))
    warm.impl.request_finished(request, [])


def test_a_step_is_plain_data(warm):
    import dataclasses
    import pickle

    request = warm.request("a", range(60))
    warm.impl.get_num_new_matched_tokens(request, 0)
    warm.impl.update_state_after_alloc(request, 48)
    step = warm.impl.build_connector_meta(scheduled(warm, request, 48, 12))
    assert dataclasses.asdict(pickle.loads(pickle.dumps(step))) == dataclasses.asdict(step)
    assert len(pickle.dumps(step)) < 1000

    def kinds(value):
        if isinstance(value, (list, tuple)):
            return set().union(*map(kinds, value), set())
        return kinds(list(value.values())) if isinstance(value, dict) else {type(value)}

    assert kinds(dataclasses.asdict(step)) <= {int, str, bool}
    execute(warm, step)
    warm.impl.build_connector_meta(idle(warm))
    warm.impl.request_finished(request, [])
    warm.check_idle()


def test_a_long_prompt_is_not_sent_with_every_step(make_engine):
    import pickle

    engine = make_engine()
    engine.add("a", range(200), max_tokens=30)
    engine.run()
    sizes = [len(pickle.dumps(step)) for step in engine.steps]
    assert max(sizes) < 1000
    assert max(sizes[4:]) < 200


def test_draft_tokens_are_not_stored_before_they_are_accepted(make_engine):
    from vllm.v1.core.sched.output import CachedRequestData

    engine = make_engine(options={"save_decode_cache": True})
    request = engine.request("a", range(46), max_tokens=50)
    engine.impl.get_num_new_matched_tokens(request, 0)
    engine.impl.update_state_after_alloc(request, 0)
    table = list(range(20, 40))
    execute(engine, engine.impl.build_connector_meta(scheduled(engine, request, 0, 46, table)))
    request.append_output_token_ids(7)

    def decode(before, count):
        output = idle(engine)
        output.scheduled_cached_reqs = CachedRequestData(
            req_ids=["a"],
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[None],
            num_computed_tokens=[before],
            num_output_tokens=[before - 45],
        )
        output.num_scheduled_tokens = {"a": count}
        step = engine.impl.build_connector_meta(output)
        execute(engine, step)
        return [move.slot_pages * 4 for move in step.all_stores()]

    # one token and three drafts: two chunks are full of what may yet be rejected
    assert decode(46, 4) == []
    request.append_output_token_ids(8)  # the rest was rejected
    assert decode(47, 4) == [16]
    for token in (1, 2, 3, 4):
        request.append_output_token_ids(token)  # all accepted
    assert decode(51, 4) == []
    engine.impl.request_finished(request, table)
    engine.impl.build_connector_meta(idle(engine))
    engine.check_idle()


def test_a_request_without_sampling_is_a_prompt_like_any_other(make_engine):
    from vllm import PoolingParams

    engine = make_engine()
    like = engine.request("a", range(60))
    for name, found in (("cold", 0), ("warm", 59)):
        request = type(like)(name, list(range(60)), None, PoolingParams(task="embed"))
        assert engine.impl.get_num_new_matched_tokens(request, 0) == found
        engine.impl.update_state_after_alloc(request, found)
        execute(
            engine, engine.impl.build_connector_meta(scheduled(engine, request, found, 60 - found))
        )
        engine.impl.request_finished(request, [])
    engine.impl.build_connector_meta(idle(engine))
    engine.check_idle()


def test_a_step_that_fails_half_way_holds_nothing(warm):
    requests = [
        warm.request(name, [*range(48), *range(n, n + 32)]) for name, n in (("a", 100), ("b", 200))
    ]
    outputs = []
    for request in requests:
        assert warm.impl.get_num_new_matched_tokens(request, 0) == 48
        warm.impl.update_state_after_alloc(request, 48)
        outputs.append(scheduled(warm, request, 48, 32))
    both = outputs[0]
    both.scheduled_new_reqs += outputs[1].scheduled_new_reqs
    both.num_scheduled_tokens |= outputs[1].num_scheduled_tokens
    both.scheduled_new_reqs[1].block_ids[0][15] = 0  # no such page
    step = warm.impl.build_connector_meta(both)
    assert (step.number, step.loads, step.stores) == (0, [], [])
    assert sorted(step.lost) == sorted([*range(20, 32), *range(20, 32)])
    assert len(warm.cache.decider.leases) == 0
    for request in requests:
        warm.impl.request_finished(request, [])
    warm.check_idle()


def test_a_store_refused_for_lack_of_room_is_not_tried_with_every_token(make_engine):
    engine = make_engine(room_bytes=2 * 8192)
    engine.generate("a", range(32))
    decider = engine.cache.decider
    holder = engine.request("holder", range(32))
    assert engine.impl.get_num_new_matched_tokens(holder, 0) == 31
    engine.add("b", range(100, 148), max_tokens=30)
    engine.run()
    assert decider.counters["refused"] == 1
    assert engine.stored == 32
    engine.impl.request_finished(holder, [])
    engine.check_text()
    engine.check_idle()


def test_a_store_refused_in_one_piece_is_tried_with_the_next(make_engine):
    engine = make_engine(room_bytes=4 * 8192, budget=16)
    engine.generate("a", range(64))
    holder = engine.request("holder", range(64))
    assert engine.impl.get_num_new_matched_tokens(holder, 0) == 63
    engine.add("b", range(100, 164), max_tokens=2)
    engine.step()
    engine.step()
    assert engine.counters["refused"] == 2
    engine.impl.request_finished(holder, [])
    engine.run()
    assert engine.generate("b again", range(100, 164)) == 63
    engine.check_text()
    engine.check_idle()


def test_generated_tokens_that_found_no_room_are_stored_when_there_is_some(make_engine):
    engine = make_engine(room_bytes=4 * 8192, budget=64, options={"save_decode_cache": True})
    engine.generate("a", range(64))
    holder = engine.request("holder", range(64))
    assert engine.impl.get_num_new_matched_tokens(holder, 0) == 63
    engine.add("b", range(100, 130), max_tokens=35)
    for _ in range(10):
        engine.step()
    assert engine.stored == 64
    engine.impl.request_finished(holder, [])
    engine.run()
    told = [*range(100, 130), *engine.outputs["b"]]
    assert engine.generate("b again", told) == 64
    engine.check_text()
    engine.check_idle()
