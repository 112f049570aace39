"""vLLM's objects in, ours out. Pure functions; no state, no copies."""

from __future__ import annotations

import platform
import re
from typing import TYPE_CHECKING, Any

from lmcache.adapters.vllm.step import StoredEvent
from lmcache.core.errors import LayoutError
from lmcache.core.exchange import exchange_namespace
from lmcache.core.keys import Identity, Insert, Namespace, digest_of
from lmcache.core.layout import PageLayout, Region, region_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from vllm.config import VllmConfig

    from lmcache.adapters.vllm.groups import Groups
    from lmcache.core.chain import KeyChain
    from lmcache.core.config import Config
    from lmcache.core.geometry import Geometry
    from lmcache.core.index import Slot

SINCE, BEFORE = (0, 22), (0, 34)
"""The vLLM versions whose KV layouts are known."""

_PAGE_AXIS_0_22 = {
    "FLASH_ATTN": 1,
    "CPU_ATTN": 1,
    "TRITON_ATTN": 0,
    "FLASHINFER": 0,
}
"""The axis that counts blocks, before 0.23 put it first everywhere."""


def version_of(text: str) -> tuple[int, int]:
    """Major and minor of a vLLM version string such as `0.32.0+cpu`."""
    found = re.match(r"(\d+)\.(\d+)", text)
    if not found:
        raise LayoutError(f"vLLM version {text!r} is not understood")
    return int(found[1]), int(found[2])


def page_axis(version: tuple[int, int], backend: str, dimensions: int) -> int:
    """Which axis of a KV tensor counts blocks. Raises `LayoutError` for what was never checked."""
    if not SINCE <= version < BEFORE:
        raise LayoutError(
            f"vLLM {version[0]}.{version[1]} has KV layouts this release does not know; "
            f"known: {SINCE[0]}.{SINCE[1]} to {BEFORE[0]}.{BEFORE[1] - 1}"
        )
    if version >= (0, 23) or dimensions == 3:  # noqa: PLR2004  (three axes: MLA)
        return 0
    if backend not in _PAGE_AXIS_0_22:
        raise LayoutError(f"attention backend {backend} of vLLM 0.22 has an unknown KV layout")
    return _PAGE_AXIS_0_22[backend]


def layout_of(
    kv_caches: Mapping[str, torch.Tensor],
    backends: Mapping[str, str],
    kv_cache_config: Any,
    groups: Groups,
    version: str,
) -> PageLayout:
    """The layout of the tensors vLLM registers, one region per distinct tensor.

    `backends` names the attention backend of each layer. Raises `LayoutError` for whatever this
    release has not been checked against.
    """
    tensors, places = distinct(kv_caches)
    regions = [
        _region(name, tensor, backends[name], kv_cache_config.num_blocks, version_of(version))
        for name, tensor in tensors.items()
    ]
    devices = {tensor.device.type for tensor in kv_caches.values()}
    kind = "/".join(sorted(set(backends.values())))
    if devices == {"cpu"}:
        kind += f"/{_cpu_format()}/vllm-{version_of(version)}"
    if not groups.keep_all:
        kind += f"/groups {groups}, {_members(kv_cache_config, places)}"
    size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    return PageLayout(tuple(regions), size, kind, groups=len(groups.windows))


def _members(kv_cache_config: Any, places: Mapping[str, int]) -> str:
    """Which layer has its pages where. Another vLLM may form groups otherwise."""
    groups = [group.layer_names for group in kv_cache_config.kv_cache_groups]
    return digest_of([[(name, places[name]) for name in names] for names in groups])


def distinct(
    kv_caches: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The tensors without those that are another's memory again, and each layer's place in them."""
    tensors: dict[str, torch.Tensor] = {}
    places: dict[tuple[Any, ...], int] = {}
    place_of: dict[str, int] = {}
    for name, tensor in kv_caches.items():
        where = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if where not in places:
            places[where] = len(tensors)
            tensors[name] = tensor
        place_of[name] = places[where]
    return tensors, place_of


def _region(
    name: str, tensor: torch.Tensor, backend: str, num_blocks: int, version: tuple[int, int]
) -> Region:
    axis = page_axis(version, backend, tensor.dim())
    blocks = tensor.shape[axis]
    if blocks % num_blocks:
        raise LayoutError(
            f"{name}: axis {axis} of {tuple(tensor.shape)} does not count {num_blocks} blocks"
        )
    return region_of(
        name,
        tensor.data_ptr(),
        tensor.shape,
        tensor.stride(),
        itemsize=tensor.element_size(),
        dtype=str(tensor.dtype),
        page_axis=axis,
        blocks_per_page=blocks // num_blocks,
    )


def _cpu_format() -> str:
    """What the CPU backend's packing of a block depends on, besides the model."""
    import torch

    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}-amx{int(amx)}"


def backends_of(vllm_config: VllmConfig, layers: Mapping[str, object]) -> dict[str, str]:
    """The name of each layer's attention backend."""
    context = vllm_config.compilation_config.static_forward_context
    return {name: context[name].get_attn_backend().get_name() for name in layers}


def namespace_of(vllm_config: VllmConfig, config: Config) -> Namespace:
    """What makes this deployment's KV bytes its own, but for the layout that the workers add."""
    if config.exchange:
        return exchange_namespace(config.exchange, config.weight_generation)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    traits = {
        "revision": model.revision,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "hf": model.hf_config.to_dict(),
        "speculative": _speculator(vllm_config),
    }
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    return Namespace(
        model=f"{config.model_id or model.model}@{digest_of(traits)}",
        generation=config.weight_generation,
        dtype=str(vllm_config.cache_config.cache_dtype),
        layout="",
        parallel=f"tp{tensor}.pp{pipeline}",
    )


def _speculator(vllm_config: VllmConfig) -> str:
    """The draft model, whose layers are cached beside the model's own."""
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    return f"{getattr(speculative, 'method', '')}:{getattr(draft, 'model', '')}"


def check_parallel(vllm_config: VllmConfig) -> None:
    """Raise `LayoutError` where a page of vLLM's table holds more tokens than a page of ours."""
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(vllm_config.parallel_config, name, 1)
        if size > 1:
            raise LayoutError(f"{name} is {size}: the tokens of a page are spread over ranks")


def fence_page_tokens(vllm_config: VllmConfig) -> int:
    """Tokens of a page on a device, where vLLM goes on while its pages are stored; else 0."""
    on_host = vllm_config.device_config.device_type == "cpu"
    return 0 if on_host else vllm_config.cache_config.block_size


def stores_may_lag(vllm_config: VllmConfig | None, kv_cache_config: Any) -> bool:
    """Whether all that writes to pages, or takes them away, waits for what we still store.

    Another connector's loads do not, nor does an engine that sleeps, nor one that clears pages.
    `vllm_config` must be the engine's own: MultiConnector hides itself from its parts.
    """
    if vllm_config is None:
        return False
    transfer: Any = vllm_config.kv_transfer_config
    return not (
        transfer.kv_connector == "MultiConnector"
        or getattr(vllm_config.model_config, "enable_sleep_mode", False)
        or getattr(kv_cache_config, "needs_kv_cache_zeroing", False)
    )


def slice_of(vllm_config: VllmConfig) -> int:
    """Which slice of every page this worker holds; MLA ranks of a stage hold the same one."""
    parallel, rank = vllm_config.parallel_config, vllm_config.parallel_config.rank
    tensor: int = parallel.tensor_parallel_size
    return int(rank // tensor if vllm_config.model_config.use_mla else rank)


def why_unkeyable(request: Any) -> str:
    """Why a request must not touch the cache, or an empty string.

    What has no key is not cached: prompt embeddings have no tokens, a LoRA adapter reloaded in
    place has no version, and a resumable request may rewrite its tokens.
    """
    if request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None:
        return "prompt embeddings"
    if getattr(request.lora_request, "load_inplace", False):
        return "a LoRA adapter that is reloaded in place"
    if getattr(request, "resumable", False):
        return "a streamed prompt"
    return ""


def must_compute(request: Any) -> bool:
    """Whether the request wants something only a forward pass over the whole prompt gives."""
    if hasattr(request, "skip_reading_prefix_cache"):
        return bool(request.skip_reading_prefix_cache)
    return getattr(request.sampling_params, "prompt_logprobs", None) is not None


def identity_of(request: Any) -> Identity:
    """What besides the tokens changes the KV bytes of a request."""
    lora = request.lora_request
    name = f"{lora.lora_name}\0{lora.lora_path}" if lora else ""
    return Identity(lora=name, salt=request.cache_salt or "")


def inserts_of(request: Any) -> list[Insert]:
    """The multimodal items of a request, by content."""
    return [
        Insert(item.identifier, item.mm_position.offset, item.mm_position.length)
        for item in getattr(request, "mm_features", None) or ()
    ]


def options_of(request: Any) -> dict[str, Any]:
    """The request's own `kv_transfer_params`."""
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    options = extra.get("kv_transfer_params") or request.kv_transfer_params
    return options if isinstance(options, dict) else {}


def stored_event(slot: Slot, geometry: Geometry, chain: KeyChain, request: Any) -> StoredEvent:
    """What vLLM's event stream is told about a stored chunk."""
    start = slot.chunk * chain.chunk_tokens
    tokens = chain.tokens[start : start + geometry.tokens_in([slot])]
    lora = request.lora_request
    return StoredEvent(
        block_hashes=[slot.key],
        parent_block_hash=chain.key(slot.chunk - 1) if slot.chunk else None,
        token_ids=list(tokens),
        block_size=len(tokens),
        lora_id=lora.lora_int_id if lora else None,
        lora_name=lora.lora_name if lora else None,
    )
