"""Whatever changes the bytes of a page changes its key, through every way an engine can say it."""

from __future__ import annotations

import itertools

import pytest

PROMPT = [*range(8), *[77] * 8, *range(20, 44)]
"""Positions 8 to 15 stand for an image where there is one."""


@pytest.fixture
def lora(rig):
    from vllm.lora.request import LoRARequest

    return LoRARequest


@pytest.fixture
def image(rig):
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    def make(identifier, offset=8, length=8):
        place = PlaceholderRange(offset=offset, length=length)
        return MultiModalFeatureSpec(None, "image", identifier, place)

    return make


def cases(lora, image):
    """Requests with the same tokens, no two of which may share a page after the eighth token."""
    return {
        "plain": {},
        "lora a": {"lora_request": lora("a", 1, "/a")},
        "lora b": {"lora_request": lora("b", 2, "/b")},
        "lora a from elsewhere": {"lora_request": lora("a", 1, "/b")},
        "salt a": {"cache_salt": "a"},
        "salt b": {"cache_salt": "b"},
        "salt /a": {"cache_salt": "/a"},
        "lora and salt": {"lora_request": lora("a", 1, "/a"), "cache_salt": "b"},
        "salt and lora": {"lora_request": lora("b", 2, "/b"), "cache_salt": "a"},
        "image a": {"mm_features": [image("a")]},
        "image b": {"mm_features": [image("b")]},
        "image a, salted": {"mm_features": [image("a")], "cache_salt": "a"},
        "image a, earlier": {"mm_features": [image("a", 7)]},
        "image a, shorter": {"mm_features": [image("a", 8, 7)]},
        "images a and b": {"mm_features": [image("a", 8, 4), image("b", 12, 4)]},
        "images b and a": {"mm_features": [image("b", 8, 4), image("a", 12, 4)]},
        "image ab": {"mm_features": [image("ab")]},
        "lora a and image a": {
            "lora_request": lora("a", 1, "/a"),
            "mm_features": [image("a")],
        },
    }


def matched(engine, name, **fields):
    """Tokens the scheduling side would load for a request, which it then forgets."""
    request = engine.request(name, PROMPT, **fields)
    found = engine.impl.get_num_new_matched_tokens(request, 0)
    engine.impl.request_finished(request, [])
    return found


def test_each_finds_itself_and_nothing_else(engine, lora, image):
    for stored, fields in cases(lora, image).items():
        request = engine.request("x", PROMPT, **fields)
        # vLLM has no such adapter or image, and our side of it does not need them to run
        tracked = engine.side._new(engine.cache, request)
        decider, geometry = engine.cache.decider, engine.cache.geometry
        slots, _ = decider.reserve(tracked.chain, geometry, 0, 40, tail=True)
        for slot in slots:
            decider.commit(slot, geometry)
        found = {name: matched(engine, name, **f) for name, f in cases(lora, image).items()}
        assert found == {name: 39 if name == stored else 0 for name in found}
        decider.clear()


def test_all_of_them_together_stay_apart(make_engine, lora, image):
    engine = make_engine()
    plans = cases(lora, image)
    for name, fields in plans.items():
        store(engine, name, fields)
    for name, fields in plans.items():
        assert matched(engine, name, **fields) == 39
    assert len(engine.cache.decider) == 3 * len(plans)


def store(engine, name, fields):
    request = engine.request(name, PROMPT, **fields)
    chain = engine.side._new(engine.cache, request).chain
    slots, _ = engine.cache.decider.reserve(chain, engine.cache.geometry, 0, 40, tail=True)
    for slot in slots:
        engine.cache.decider.commit(slot, engine.cache.geometry)


def test_an_image_after_the_prefix_does_not_matter(engine, image):
    store(engine, "plain", {})
    request = engine.request("x", [*PROMPT, 5, 5, 5], mm_features=[image("a", 40, 3)])
    assert engine.impl.get_num_new_matched_tokens(request, 0) == 40
    engine.impl.request_finished(request, [])


def test_images_share_the_chunks_before_them(engine, image):
    late = {name: {"mm_features": [image(name, 20, 8)]} for name in "ab"}
    store(engine, "a", late["a"])
    assert matched(engine, "b", **late["b"]) == 16
    assert matched(engine, "a", **late["a"]) == 39


def test_salts_keep_tenants_apart_in_a_running_engine(make_engine):
    engine = make_engine(prefix_caching=True)
    assert engine.generate("a", range(40), cache_salt="a") == 0
    assert engine.generate("b", range(40), cache_salt="b") == 0
    assert engine.generate("none", range(40)) == 0
    assert engine.generate("a again", range(60), cache_salt="a") == 0  # vLLM itself has it
    engine.scheduler.reset_prefix_cache()
    assert engine.generate("a and again", range(60), cache_salt="a") == 60 - 1
    engine.check_text()
    engine.check_idle()


def test_adapters_keep_apart_in_a_running_engine(engine, lora):
    for number, name in enumerate("ab", 1):
        assert engine.generate(name, range(40), lora_request=lora(name, number, f"/{name}")) == 0
    assert engine.generate("plain", range(40)) == 0
    again = lora("b", 2, "/b")
    assert engine.generate("b again", range(40), lora_request=again) == 39
    engine.check_text("plain")
    engine.check_text("b", "b again", lora="b")
    engine.check_idle()


def namespaces(base_config):
    """Configurations of engines that must not share a store."""

    def vary(**changes):
        import copy

        config = copy.copy(base_config)
        for place, value in changes.items():
            part, name = place.split("__")
            setattr(config, part, copy.copy(getattr(config, part)))
            setattr(getattr(config, part), name, value)
        return config

    return {
        "plain": vary(),
        "revision": vary(model_config__revision="abc"),
        "dtype": vary(model_config__dtype="float16"),
        "cache dtype": vary(cache_config__cache_dtype="fp8"),
        "quantization": vary(model_config__quantization="fp8"),
        "tensor parallel": vary(parallel_config__tensor_parallel_size=2),
        "pipeline parallel": vary(parallel_config__pipeline_parallel_size=2),
        "model": vary(model_config__model="elsewhere"),
    }


def test_deployments_keep_apart(rig, base_config):
    from lmcache.adapters.vllm.translate import namespace_of
    from lmcache.core.config import load_config
    from lmcache.core.keys import Identity, root_key

    default = load_config({}).config
    roots = {
        name: root_key(namespace_of(config, default), Identity())
        for name, config in namespaces(base_config).items()
    }
    for change in ({"lmcache.weight_generation": "2"}, {"lmcache.model_id": "m"}):
        config = load_config(change).config
        roots[str(change)] = root_key(namespace_of(base_config, config), Identity())
    for one, other in itertools.combinations(roots, 2):
        assert roots[one] != roots[other], (one, other)


def test_a_model_id_stands_for_the_path(rig, base_config):
    from lmcache.adapters.vllm.translate import namespace_of
    from lmcache.core.config import load_config

    config = load_config({"lmcache.model_id": "m"}).config
    plans = namespaces(base_config)
    assert namespace_of(plans["plain"], config) == namespace_of(plans["model"], config)
