"""Models whose layers look back differently far: a hit is what every cache group can restore."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

WINDOW = 12
HYBRIDS = {
    "one of each": (WINDOW, None),
    "two to one": (WINDOW, WINDOW, None),
    "longer than a chunk": (40, None),
    "shorter than a page": (3, None),
    "no full attention": (WINDOW, WINDOW),
    "three groups": (WINDOW, WINDOW, None, WINDOW, WINDOW, None),
}


@pytest.fixture
def make(make_engine, make_house):
    def make(windows=(WINDOW, None), house=None, **options):
        engine = make_engine(windows=windows, house=house or make_house(), **options)
        engine.wait_attached()
        return engine

    return make


@pytest.mark.parametrize("windows", HYBRIDS.values(), ids=HYBRIDS)
def test_what_was_computed_is_loaded(make, windows):
    engine = make(windows)
    assert engine.generate("cold", range(100)) == 0
    assert engine.generate("warm", range(100)) == 99
    assert engine.generate("longer", range(150)) == 100
    engine.check_text()
    engine.check_idle()


@pytest.mark.parametrize("windows", HYBRIDS.values(), ids=HYBRIDS)
@pytest.mark.parametrize("budget", [7, 16, 33])
def test_in_pieces(make, windows, budget):
    """Pages that are out of every window are gone when the chunk around them is complete."""
    engine = make(windows, budget=budget)
    engine.generate("cold", range(100))
    for length in range(1, 100, 5):
        engine.generate(f"first {length}", range(length), max_tokens=2)
    engine.check_text()
    engine.check_idle()
    assert engine.loaded


def test_only_pages_that_are_looked_at_are_loaded(make):
    engine = make((WINDOW, None), pages=90)
    engine.generate("cold", range(100))
    engine.generate("warm", range(100))
    [load] = [copy for step in engine.steps for copy in step.loads]
    pages = [page for move in load.moves for page in move.engine_pages]
    assert 0 not in pages, "vLLM's null page"
    # one group needs all 25 pages, the other those of the tokens 88 .. 98
    assert len(pages) == len(set(pages)) == 25 + 3
    engine.check_text()


def test_less_room_than_was_asked_for(make, monkeypatch):
    """The windows of the tokens before the end of the hit may not be restorable."""
    engine = make(budget=30)
    engine.generate("cold", range(100))
    matched = engine.impl.get_num_new_matched_tokens

    def fewer(request, local):
        tokens, outside = matched(request, local)
        return (tokens - 20 if tokens else tokens), outside

    monkeypatch.setattr(engine.impl, "get_num_new_matched_tokens", fewer)
    assert engine.generate("warm", range(100)) == 0
    assert engine.runner.refused
    engine.check_text()
    engine.check_idle()


def test_a_slot_that_is_not_what_it_was(make):
    engine = make()
    engine.generate("cold", range(100))
    geometry, decider = engine.cache.geometry, engine.decider
    [entry, *_] = list(decider._shelf.policy.victims())
    decider.slab.write_word(decider._index.offset[entry] + geometry.tag_offset(0), 1)
    engine.generate("warm", range(100))
    assert len(engine.runner.refused) == 1
    assert not any(engine.runner.invalid), "vLLM ends its engine if it is told of pages"
    engine.check_text()
    engine.check_idle()


def test_the_engines_of_a_server_must_agree(make, make_house):
    """Neither takes the other's chunks, whose layers may look back less far."""
    house = make_house()
    first, second = make((WINDOW, None), house=house), make((2 * WINDOW, None), house=house)
    first.generate("cold", range(100))
    assert second.generate("cold", range(100)) == 0
    assert second.generate("warm", range(100)) == 99
    for engine in (first, second):
        engine.check_text()


def test_a_tail_whose_last_token_was_computed_earlier(make):
    """A window that is no multiple of a page has left behind what is needed at the tail's end."""
    engine = make((10, None), budget=45)
    engine.generate("in pieces", range(47))
    for length in (48, 60):
        engine.generate(f"longer {length}", range(length))
    engine.check_text()
    engine.check_idle()


@pytest.mark.parametrize(
    ("before", "in_flight", "is_stored"),
    [(280, 0, True), (287, 0, True), (288, 0, False), (432, 0, False), (288, 1, True)],
)
def test_nothing_is_stored_after_its_last_token(rig, before, in_flight, is_stored):
    """A tail, say, that is missing when its request comes back, with the window far beyond it."""
    from lmcache.adapters.vllm.draft import Draft, Tracked
    from lmcache.adapters.vllm.groups import Groups
    from lmcache.core.receipts import Reason

    asked = []

    def reserve(chain, start, stop, *, tail):
        asked.append((start, stop, tail))
        return [], Reason.NO_ROOM

    geometry = SimpleNamespace(chunk_tokens=256, page_tokens=16)
    cache = SimpleNamespace(geometry=geometry, number=1, reserve=reserve)
    request = SimpleNamespace(request_id="a", num_in_flight_tokens=in_flight)
    tracked = Tracked(request, None, may_load=True, may_store=True, done=256)
    Draft(cache, Groups((128, None)), events=False).store(tracked, before, 288, tail=True)
    assert asked == ([(256, 288, True)] if is_stored else [])


@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_generated_is_stored_too(make, ahead):
    engine = make(asynchronous=ahead, options={"save_decode_cache": True})
    engine.generate("a", range(40), max_tokens=60)
    longer = [*range(40), *engine.outputs["a"]]
    assert engine.generate("b", [*longer, 7, 7, 7]) == 96
    engine.check_text()
    engine.check_idle()
