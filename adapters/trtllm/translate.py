"""TensorRT-LLM's objects in, ours out. Pure functions; no state, no copies."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache.core.errors import ConfigError, LayoutError
from lmcache.core.keys import Identity, Insert, Namespace, digest_of
from lmcache.core.layout import PageLayout, region_of
from lmcache.core.log import init_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lmcache.core.config import Config

logger = init_logger(__name__)

_POOL = 4
"""Axes of a pool: block, layer, keys and values, and the rest of a block."""
_EMBEDDINGS = ("multimodal_embedding", "prompt_embedding_table")
"""What stands for tokens of a prompt without a hash of its content."""
_TRAITS = ("revision", "dtype", "quant_config", "attn_backend", "speculative_config")


# ---- how it was started


def check_args(llm_args: Any) -> None:
    """Raise `ConfigError` for what cannot be cached; warn of what makes a cache useless."""
    cache = llm_args.kv_cache_config
    quantization = f"{getattr(cache, 'dtype', '')} {_kv_quantization(llm_args)}"
    refused = {
        "pipeline_parallel_size": getattr(llm_args, "pipeline_parallel_size", 1) > 1,
        "context_parallel_size": getattr(llm_args, "context_parallel_size", 1) > 1,
        "max_beam_width": (getattr(llm_args, "max_beam_width", 1) or 1) > 1,
        "enable_attention_dp": bool(getattr(llm_args, "enable_attention_dp", False)),
        "kv_cache_config.host_cache_size": bool(getattr(cache, "host_cache_size", None)),
        "kv_cache_config.max_attention_window": bool(getattr(cache, "max_attention_window", None)),
        "a KV cache of nvfp4": "nvfp4" in quantization.lower(),
    }
    for option, is_used in refused.items():
        if is_used:
            raise ConfigError(f"TensorRT-LLM cannot use LMCache together with {option}")
    _check_node(llm_args)
    if not getattr(cache, "enable_block_reuse", True):
        logger.warning(
            "enable_block_reuse is off: TensorRT-LLM does not ask for what is stored; "
            "set KvCacheConfig(enable_block_reuse=True)"
        )
    if getattr(cache, "enable_partial_reuse", False):
        logger.warning(
            "enable_partial_reuse is on: nothing is loaded for a prompt of which TensorRT-LLM has "
            "a part of a block; set KvCacheConfig(enable_partial_reuse=False)"
        )


def _kv_quantization(llm_args: Any) -> str:
    """What the model says of its KV cache, if anything."""
    said = getattr(getattr(llm_args, "quant_config", None), "kv_cache_quant_algo", None)
    file = Path(str(llm_args.model)) / "hf_quant_config.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return f"{said} {found.get('quantization', {}).get('kv_cache_quant_algo')}"


def _check_node(llm_args: Any) -> None:
    here = getattr(llm_args, "gpus_per_node", None)
    if here and here < ranks_of(llm_args):
        raise ConfigError(
            f"{ranks_of(llm_args)} ranks on nodes of {here}: the ranks of an engine must be on one"
        )


def ranks_of(llm_args: Any) -> int:
    """How many processes run the model."""
    return int(getattr(llm_args, "tensor_parallel_size", 1))


def page_tokens_of(llm_args: Any) -> int:
    """Tokens of a block."""
    return int(llm_args.kv_cache_config.tokens_per_block)


def namespace_of(llm_args: Any, config: Config) -> Namespace:
    """What makes this engine's KV bytes its own, but for the layout.

    TensorRT-LLM knows a model by its name or folder; of a folder, what its `config.json` says
    counts as well.
    """
    traits = {name: str(getattr(llm_args, name, None)) for name in _TRAITS}
    traits["hf"] = _hf_config(Path(str(llm_args.model)))
    return Namespace(
        model=f"{config.model_id or llm_args.model}@{digest_of(traits)}",
        generation=config.weight_generation,
        dtype=str(getattr(llm_args.kv_cache_config, "dtype", "auto")),
        layout="",
        parallel=f"tp{ranks_of(llm_args)}",
    )


def _hf_config(folder: Path) -> Any:
    file = folder / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def kind_of(llm_args: Any) -> str:
    """Who lays blocks out."""
    return f"TensorRT-LLM/{getattr(llm_args, 'attn_backend', None) or 'TRTLLM'}"


# ---- its pools


def layout_of(pool: torch.Tensor, page_tokens: int, kind: str) -> PageLayout:
    """The layout of a pool that is one tensor, of which a block is a row.

    Raises `LayoutError` for another.
    """
    if pool.dim() != _POOL or not pool[0].is_contiguous():
        raise LayoutError(
            f"a pool of shape {tuple(pool.shape)}, strides {pool.stride()}; only "
            "[blocks, layers, keys and values, rest] without gaps in a block is known"
        )
    region = region_of(
        "pool",
        pool.data_ptr(),
        pool.shape,
        pool.stride(),
        itemsize=pool.element_size(),
        dtype=str(pool.dtype),
        page_axis=0,
    )
    return PageLayout((region,), page_tokens, kind)


def regions_layout(layout: Any, kind: str) -> tuple[PageLayout, list[torch.Tensor]]:
    """Likewise of pools described by TensorRT-LLM, and the tensors of its regions.

    Raises `LayoutError` for more than one group of layers.
    """
    import torch

    if len(layout.groups) != 1:
        raise LayoutError(
            f"{len(layout.groups)} groups of layers; only models whose layers all look at all "
            "tokens are cached"
        )
    [group] = layout.groups
    if group.window_size is not None or getattr(group, "replicated_regions", None):
        raise LayoutError(f"layers with a window of {group.window_size} or with replicas")
    regions, tensors = [], []
    for number, region in enumerate(group.regions):
        buffers = ", ".join(f"{layer} {role} x{times}" for layer, role, times in region.buffers)
        regions.append(
            region_of(
                f"region {number}",
                region.base,
                (region.num_slots, region.size),
                (region.stride, 1),
                itemsize=1,
                dtype=f"{getattr(layout, 'dtype', '')} ({buffers})",
                page_axis=0,
            )
        )
        tensors.append(region.as_tensor(torch.uint8))
    return PageLayout(tuple(regions), int(layout.tokens_per_block), kind), tensors


# ---- its requests


def tokens_of(request: Any) -> array[int]:
    """The prompt's tokens. Raises `OverflowError` for what is no token."""
    return array("I", request.get_tokens(0))


def identity_of(request: Any, engine_id: str) -> Identity:
    """What besides the tokens changes the KV bytes of a request.

    TensorRT-LLM says only the number of a LoRA adapter, which another engine may give to another.
    """
    lora = request.lora_task_id
    salt = getattr(request, "cache_salt", None)
    if salt is None:
        number = getattr(request, "cache_salt_id", None)
        salt = "" if number is None else f"\0{number}"
    return Identity(lora="" if lora is None else f"{engine_id} {lora}", salt=str(salt))


def inserts_of(request: Any) -> list[Insert] | None:
    """What the prompt shows besides text, by content; None if its content is not said."""
    hashes = getattr(request, "multimodal_hashes", None) or []
    positions = getattr(request, "multimodal_positions", None) or []
    lengths = getattr(request, "multimodal_lengths", None) or []
    if not len(hashes) == len(positions) == len(lengths):
        return None
    if not hashes and any(getattr(request, name, None) is not None for name in _EMBEDDINGS):
        return None
    return [
        Insert(" ".join(map(str, digest)), int(start), int(length))
        for digest, start, length in zip(hashes, positions, lengths, strict=True)
    ]


def blocks_of(data: Any) -> Sequence[int]:
    """Blocks that a request was given, in the order of its tokens."""
    groups = getattr(data, "new_block_ids_by_layer_group", None)
    blocks: Sequence[int] = groups[0] if groups else data.new_block_ids
    return blocks
