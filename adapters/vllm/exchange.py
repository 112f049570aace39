"""Pages in the order of an exchange: where each key and value lies, learned from who writes them.

vLLM's attention backends keep keys and values each in an order of its own, on CPUs one that
depends on the processor. So numbers are written with the backend's own function into one page,
and read where they are found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lmcache.adapters.vllm.translate import distinct
from lmcache.core.errors import LayoutError
from lmcache.core.exchange import Content, check_alone
from lmcache.core.layout import PageLayout, Region

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm.config import VllmConfig

_DIGIT = 8
"""Bits of a number that every type of an exchange holds exactly."""


class Pages(NamedTuple):
    """The pages of an engine, as `check_layout` takes them."""

    layout: PageLayout
    tensors: list[torch.Tensor]
    """One for each region."""
    axes: list[int]
    """Which axis of each tensor counts pages."""
    places: Sequence[torch.Tensor] = ()
    """Where in a page each word of an object lies, for each region; none if in the same order."""


class _Layer(NamedTuple):
    name: str
    module: Any
    tensor: torch.Tensor
    axis: int
    heads: int
    head_dim: int


def exchange_pages(
    vllm_config: VllmConfig,
    kv_cache_config: Any,
    kv_caches: Mapping[str, torch.Tensor],
    axes: Mapping[str, int],
) -> Pages:
    """Learn the order of vLLM's pages. Only before serving: a page is written, and restored.

    `axes` says which axis of each tensor counts pages. Raises `LayoutError` for what has no such
    order.
    """
    check_alone(vllm_config.parallel_config.world_size)
    if vllm_config.speculative_config is not None:
        raise LayoutError("an exchange is for engines without speculative decoding")
    spec = _spec(kv_cache_config)
    if len(distinct(kv_caches)[0]) < len(kv_caches):
        raise LayoutError("an exchange is for models whose layers have memory of their own")
    context = vllm_config.compilation_config.static_forward_context
    layers = [
        _Layer(name, context[name], tensor, axes[name], spec.num_kv_heads, spec.head_size)
        for name, tensor in sorted(kv_caches.items(), key=lambda item: _number(item[0]))
    ]
    first = layers[0]
    content = Content(
        layers=len(layers),
        heads=first.heads,
        head_dim=first.head_dim,
        dtype=str(first.tensor.dtype),
        itemsize=first.tensor.element_size(),
    )
    size, blocks = spec.block_size, kv_cache_config.num_blocks
    regions: list[Region] = []
    places: list[torch.Tensor] = []
    for layer in layers:
        learned = _learn(layer, size, blocks)
        regions += _regions(layer, content, size, blocks)
        # most layers are alike, and need not each keep theirs
        alike = places[:2]
        same = alike and all(map(torch.equal, alike, learned))
        places += alike if same else learned
    return Pages(
        PageLayout(tuple(regions), size, "vLLM", common=content.summary),
        [layer.tensor for layer in layers for _ in range(2)],
        [layer.axis for layer in layers for _ in range(2)],
        places,
    )


def _spec(kv_cache_config: Any) -> Any:
    """What vLLM says of each layer's pages."""
    groups = kv_cache_config.kv_cache_groups
    spec = groups[0].kv_cache_spec
    is_full = type(spec).__name__ == "FullAttentionSpec"
    windows = [getattr(spec, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if len(groups) != 1 or not is_full or windows != [None, None]:
        raise LayoutError("an exchange is for models whose layers all look at all tokens")
    return spec


def _number(name: str) -> int:
    """A layer's place in the model."""
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    if len(numbers) != 1:
        raise LayoutError(f"{name}: an exchange is for layers that are counted")
    return numbers[0]


def _regions(layer: _Layer, content: Content, page_tokens: int, blocks: int) -> list[Region]:
    """Keys and values. What lies where in a page, only the places say."""
    tensor, axis = layer.tensor, layer.axis
    stride = tensor.stride(axis) * tensor.element_size() * (tensor.shape[axis] // blocks)
    return [
        Region(
            name=f"{layer.name} {what}",
            base=tensor.data_ptr(),
            pages=blocks,
            page_stride=stride,
            axes=(),
            run_bytes=page_tokens * content.row_bytes,
            meaning=content.summary,
        )
        for what in ("keys", "values")
    ]


def _learn(layer: _Layer, page_tokens: int, blocks: int) -> list[torch.Tensor]:
    """Places of the keys and of the values: of each token in turn, all heads."""
    tensor = layer.tensor
    write = getattr(getattr(layer.module, "impl", None), "do_kv_cache_update", None)
    if write is None:
        raise LayoutError(f"{layer.name}: its backend does not say how keys are written")
    page = blocks // 2
    share = tensor.shape[layer.axis] // blocks
    own = tensor.narrow(layer.axis, page * share, share)
    slots = torch.arange(page * page_tokens, (page + 1) * page_tokens, device=tensor.device)
    numbers = torch.arange(2 * page_tokens * layer.heads * layer.head_dim, device=tensor.device)
    numbers = numbers.view(2, page_tokens, layer.heads, layer.head_dim)
    if numbers.numel() != own.numel():
        raise LayoutError(f"{layer.name}: a page of {tuple(own.shape)} is not {numbers.shape}")
    found = torch.zeros(own.shape, dtype=torch.int64, device=tensor.device)
    kept = own.clone()
    try:
        for shift in range(0, numbers.numel().bit_length(), _DIGIT):
            digits = ((numbers >> shift) % (1 << _DIGIT)).to(tensor.dtype)
            write(layer.module, digits[0], digits[1], tensor, slots)
            found |= own.to(torch.int64) << shift
    except Exception as error:
        raise LayoutError(f"{layer.name}: its backend cannot write keys: {error!r}") from error
    finally:
        own.copy_(kept)
    return _places(layer.name, found, own.stride(), numbers)


def _places(
    name: str, found: torch.Tensor, strides: Sequence[int], numbers: torch.Tensor
) -> list[torch.Tensor]:
    """Where each number was found. Raises `LayoutError` unless all were, each once."""
    seen, order = found.ravel().sort()
    if not torch.equal(seen, numbers.ravel()):
        raise LayoutError(f"{name}: keys and values are not kept as they are computed")
    offsets = torch.zeros((), dtype=torch.int64, device=found.device)
    for size, stride in zip(found.shape, strides, strict=True):
        offsets = offsets[..., None] + torch.arange(size, device=found.device) * stride
    keys, values = offsets.ravel()[order].chunk(2)
    return [keys, values]
