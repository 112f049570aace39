"""Where vLLM's backends keep each key and value is learned from what they write."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from lmcache.core.errors import LayoutError
from lmcache.core.geometry import Geometry
from lmcache.core.kernels.copier import copier_for
from lmcache.core.kernels.plan import Span
from lmcache.core.selfcheck import check_layout
from lmcache.core.slab import CONTROL_BYTES, Slab

pytestmark = pytest.mark.usefixtures("rig")  # which imports vLLM, as only it may

BLOCKS, HEADS, DIM, LAYERS = 5, 2, 32, 3
FOR_CPUS = [
    ("vec", 64, torch.float32),
    ("vec16", 16, torch.float32),
    ("vec", 32, torch.bfloat16),
    ("vec16", 48, torch.bfloat16),
    ("vec", 64, torch.float16),
    ("amx", 64, torch.bfloat16),
]


@dataclass
class FullAttentionSpec:
    """vLLM's spec of this name, as far as an exchange needs it."""

    block_size: int
    num_kv_heads: int = HEADS
    head_size: int = DIM
    sliding_window: int | None = None
    attention_chunk_size: int | None = None


def packed(isa):
    """vLLM's backend for CPUs from 0.23 on, which writes for some processor."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    impl = SimpleNamespace(attn_type="decoder", kv_cache_dtype="auto")

    def write(layer, key, value, tensor, slots):
        CPUAttentionBackendImpl.do_kv_cache_update(impl, layer, key, value, tensor, slots)

    return SimpleNamespace(
        isa=isa,
        _k_scale_float=1.0,
        _v_scale_float=1.0,
        impl=SimpleNamespace(do_kv_cache_update=write),
    )


def plain(page_tokens, axis):
    """A backend that keeps pages of [2, tokens, heads, elements], with K and V before the pages or
    behind them."""

    def write(layer, key, value, tensor, slots):
        pages = tensor.movedim(axis, 0)
        for token, slot in enumerate(slots.tolist()):
            page, place = divmod(slot, page_tokens)
            pages[page, 0, place], pages[page, 1, place] = key[token], value[token]

    return SimpleNamespace(impl=SimpleNamespace(do_kv_cache_update=write))


def learned(
    module, tensors, page_tokens, axis=0, *, ranks=1, groups=1, speculative=None, names=None, **spec
):
    from lmcache.adapters.vllm.exchange import exchange_pages

    names = names or [f"model.layers.{n}.attn" for n in range(len(tensors))]
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=ranks),
        speculative_config=speculative,
        compilation_config=SimpleNamespace(
            static_forward_context=dict.fromkeys(names, module),
        ),
    )
    group = SimpleNamespace(kv_cache_spec=FullAttentionSpec(page_tokens, **spec))
    kv_cache_config = SimpleNamespace(num_blocks=BLOCKS, kv_cache_groups=[group] * groups)
    caches = dict(zip(names, tensors, strict=True))
    return exchange_pages(config, kv_cache_config, caches, dict.fromkeys(names, axis))


def prompt(tokens, dtype):
    """Keys and values of a prompt for each layer."""
    torch.manual_seed(tokens)
    return torch.randn(LAYERS, 2, tokens, HEADS, DIM).to(dtype)


def stored(pages, table):
    """The payload of an object of these pages, and what brings it back."""
    layout = pages.layout
    geometry = Geometry(layout.page_tokens, len(table), (layout.page_bytes,), bytes(32))
    slab = Slab.create(CONTROL_BYTES + geometry.slot_bytes(len(table)))
    start = CONTROL_BYTES + geometry.payload_offset(0, len(table))
    copier = copier_for(layout, slab, pages.tensors, places=pages.places)
    size = copier.copy([Span(start, len(table), 0, table)], None, to_slab=True)
    payload = bytes(slab.view[start : start + size])

    def bring_back(table):
        copier.copy([Span(start, len(table), 0, table)], None, to_slab=False)
        copier.close()
        slab.close()

    return payload, bring_back


def there_and_back(module, tensors, page_tokens, axis):
    pages = learned(module, tensors, page_tokens, axis)
    check_layout(*pages)
    dtype = tensors[0].dtype
    said = prompt(2 * page_tokens, dtype)
    table = [3, 1]
    slots = torch.cat([torch.arange(page_tokens) + page * page_tokens for page in table])
    for tensor, (key, value) in zip(tensors, said, strict=True):
        module.impl.do_kv_cache_update(module, key, value, tensor, slots)
    payload, bring_back = stored(pages, table)
    assert payload == said.contiguous().view(torch.uint8).numpy().tobytes()
    written = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    bring_back(table)
    for tensor, before in zip(tensors, written, strict=True):
        for page in table:
            assert torch.equal(tensor.select(axis, page), before.select(axis, page))
            tensor.select(axis, page).zero_()
        assert not tensor.any(), "another page was written"


@pytest.mark.parametrize(("isa", "page_tokens", "dtype"), FOR_CPUS)
def test_objects_hold_keys_and_values_token_after_token(isa, page_tokens, dtype):
    shape = (BLOCKS, HEADS, page_tokens, 2 * DIM)
    tensors = [torch.zeros(shape, dtype=dtype) for _ in range(LAYERS)]
    there_and_back(packed(isa), tensors, page_tokens, 0)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("page_tokens", [1, 16])
def test_other_orders(page_tokens, axis):
    shape = [2, page_tokens, HEADS, DIM]
    shape.insert(axis, BLOCKS)
    tensors = [torch.zeros(shape) for _ in range(LAYERS)]
    there_and_back(plain(page_tokens, axis), tensors, page_tokens, axis)


def test_layers_that_share_one_memory():
    memory = torch.zeros(BLOCKS, LAYERS, 2, 16, HEADS, DIM)
    tensors = [memory[:, layer] for layer in range(LAYERS)]
    there_and_back(plain(16, 0), tensors, 16, 0)


def test_the_page_that_is_written_to_is_restored():
    tensors = [torch.randn(BLOCKS, 2, 16, HEADS, DIM)]
    before = tensors[0].clone()
    learned(plain(16, 0), tensors, 16)
    assert torch.equal(tensors[0], before)
    module = plain(16, 0)
    module.impl.do_kv_cache_update = lambda layer, key, value, tensor, slots: tensor[2].zero_()
    with pytest.raises(LayoutError):
        learned(module, tensors, 16)
    assert torch.equal(tensors[0], before)


def spoiled(change):
    """A backend that keeps something else than what is computed."""
    module = plain(16, 0)
    write = module.impl.do_kv_cache_update
    module.impl.do_kv_cache_update = lambda layer, key, value, *rest: write(
        layer, *change(key, value), *rest
    )
    return module


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda key, value: (key * 2, value), id="scaled"),
        pytest.param(lambda key, value: (key, key), id="no values"),
        pytest.param(lambda key, value: (torch.cat([key[:-1], key[:1]]), value), id="a token less"),
        pytest.param(lambda key, value: (key.flip(0)[:1].expand_as(key), value), id="one token"),
    ],
)
def test_what_is_not_kept_as_it_is_computed_is_refused(change):
    with pytest.raises(LayoutError, match="not kept as they are computed"):
        learned(spoiled(change), [torch.zeros(BLOCKS, 2, 16, HEADS, DIM)], 16)


@pytest.mark.parametrize(
    ("tensor", "changes", "reason"),
    [
        (torch.zeros(BLOCKS, 2, 16, HEADS, DIM), {"ranks": 2}, "one rank, this one has 2"),
        (torch.zeros(BLOCKS, 2, 16, HEADS, DIM), {"groups": 2}, "look at all tokens"),
        (torch.zeros(BLOCKS, 2, 16, HEADS, DIM), {"sliding_window": 8}, "look at all tokens"),
        (torch.zeros(BLOCKS, 2, 16, HEADS, DIM), {"attention_chunk_size": 8}, "at all tokens"),
        (torch.zeros(BLOCKS, 2, 16, HEADS, DIM), {"speculative": "draft"}, "without speculative"),
        (torch.zeros(BLOCKS, 2, 16, HEADS, DIM), {"names": ["encoder"]}, "that are counted"),
        (torch.zeros(BLOCKS, 2, 16, HEADS, DIM, dtype=torch.uint8), {}, "not for torch.uint8"),
        (torch.zeros(BLOCKS, 16, HEADS, DIM), {}, "is not"),
    ],
)
def test_what_has_no_such_order_is_refused(tensor, changes, reason):
    with pytest.raises(LayoutError, match=reason):
        learned(plain(16, 0), [tensor], 16, **changes)


def test_layers_that_have_one_memory_are_refused():
    """One of them is never written by an engine that keeps both."""
    tensor = torch.zeros(BLOCKS, 2, 16, HEADS, DIM)
    with pytest.raises(LayoutError, match="memory of their own"):
        learned(plain(16, 0), [tensor, tensor], 16)


def test_layers_are_in_the_models_order():
    tensors = [torch.zeros(BLOCKS, 2, 1, HEADS, DIM) for _ in range(11)]
    names = [f"model.layers.{n}.attn" for n in reversed(range(11))]
    pages = learned(plain(1, 0), tensors, 1, names=names)
    bases = [region.base for region in pages.layout.regions[::2]]
    assert bases == [tensor.data_ptr() for tensor in reversed(tensors)]


def test_a_backend_that_does_not_show_how_it_writes_is_refused():
    tensor = torch.zeros(BLOCKS, 2, 16, HEADS, DIM)
    with pytest.raises(LayoutError, match="does not say how"):
        learned(SimpleNamespace(impl=None), [tensor], 16)
    with pytest.raises(LayoutError, match="cannot write keys: .*KeyError"):
        learned(spoiled(lambda key, value: {}["no such"]), [tensor], 16)
