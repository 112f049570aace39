"""SGLang's objects in, ours out. Pure functions; no state, no copies."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from lmcache.core.errors import ConfigError, LayoutError
from lmcache.core.exchange import Content, exchange_namespace
from lmcache.core.keys import Namespace, digest_of
from lmcache.core.layout import PageLayout, region_of
from lmcache.core.log import init_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lmcache.core.config import Config

logger = init_logger(__name__)

_NHD = 3
"""Axes of a pool whose slots are tokens: slot, head, element."""


def pools_of(k_pool: Sequence[torch.Tensor], v_pool: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors in the order of their regions: keys and values of each layer in turn."""
    if len(k_pool) != len(v_pool) or not k_pool:
        raise LayoutError(f"{len(k_pool)} layers of keys and {len(v_pool)} of values")
    return [tensor for pair in zip(k_pool, v_pool, strict=True) for tensor in pair]


def unified_pools(
    kvcache: Any, components: Sequence[Any], window: int | None
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """Keys and values of a pool as SGLang has them from 0.5.21 on.

    Raises `LayoutError` for all but full attention over one pool of keys and values.
    """
    names = [str(getattr(component, "name", component)) for component in components]
    if names != ["FULL"] or window is not None:
        raise LayoutError(
            f"a radix tree of {' and '.join(names)} (window {window}): only models whose layers "
            "all look at all tokens are cached"
        )
    order = getattr(kvcache, "kv_cache_layout", "nhd")
    if order != "nhd" or not hasattr(kvcache, "k_buffer") or not hasattr(kvcache, "v_buffer"):
        raise LayoutError(
            f"a pool of the kind {type(kvcache).__name__} ({order}): only keys and values in "
            "pools of their own are cached (--kv-cache-layout nhd, no latent attention)"
        )
    return kvcache.k_buffer, kvcache.v_buffer


def layout_of(pools: Sequence[torch.Tensor], *, exchanged: bool = False) -> PageLayout:
    """The layout of pools whose pages are single tokens, whatever SGLang's page size.

    Objects of an exchange are in this very order, which all engines name alike. Raises
    `LayoutError` for a pool that is not one row of heads for each token.
    """
    regions = []
    for number, pool in enumerate(pools):
        name = f"layer {number // 2} {'values' if number % 2 else 'keys'}"
        if pool.dim() != _NHD or not pool.is_contiguous():
            raise LayoutError(
                f"{name}: shape {tuple(pool.shape)}, strides {pool.stride()}; only pools of "
                "[slots, heads, head_dim] without gaps are known (--kv-cache-layout nhd)"
            )
        region = region_of(
            name,
            pool.data_ptr(),
            pool.shape,
            pool.stride(),
            itemsize=pool.element_size(),
            dtype=str(pool.dtype),
            page_axis=0,
        )
        regions.append(region)
    common = _content(pools).summary if exchanged else ""
    return PageLayout(tuple(regions), 1, "SGLang/NHD", common=common)


def _content(pools: Sequence[torch.Tensor]) -> Content:
    alike = {(tuple(pool.shape[1:]), pool.dtype) for pool in pools}
    if len(alike) > 1:
        raise LayoutError(f"an exchange is for layers that are all alike, not {alike}")
    _, heads, head_dim = pools[0].shape
    return Content(
        layers=len(pools) // 2,
        heads=heads,
        head_dim=head_dim,
        dtype=str(pools[0].dtype),
        itemsize=pools[0].element_size(),
    )


def namespace_of(
    sgl_config: Any, config: Config, pools: Sequence[torch.Tensor], parallel: str
) -> Namespace:
    """What makes this rank's KV bytes its own, but for the layout."""
    if config.exchange:
        return exchange_namespace(config.exchange, config.weight_generation)
    hf_config = getattr(sgl_config, "hf_config", None)
    traits = {
        "revision": getattr(sgl_config, "revision", None),
        "dtype": str(getattr(sgl_config, "dtype", None)),
        "quantization": str(getattr(sgl_config, "quantization", None)),
        "hf": hf_config.to_dict() if hf_config is not None else None,
    }
    server_args = server_args_of()
    return Namespace(
        model=f"{config.model_id or sgl_config.model_path}@{digest_of(traits)}",
        generation=config.weight_generation,
        dtype=f"{getattr(server_args, 'kv_cache_dtype', 'auto')}:{pools[0].dtype}",
        layout="",
        parallel=parallel,
    )


def server_args_of() -> Any:
    """How SGLang was started; None if this is not its server."""
    try:
        from sglang.srt.runtime_context import get_server_args
    except ImportError:  # before 0.5.20
        try:
            from sglang.srt.server_args import get_global_server_args as get_server_args
        except ImportError:
            return None
    try:
        return get_server_args()
    except (AttributeError, RuntimeError, ValueError) as error:  # none have been set
        logger.warning("cannot see how SGLang was started: %s", error)
        return None


def check_server(server_args: Any) -> None:
    """Raise `ConfigError` for ways to serve in which SGLang does not say what tells KV apart.

    It calls without the adapter of a request, and without the rank in its pipeline.
    """
    refused = {
        "--pp-size": getattr(server_args, "pp_size", 1) > 1,
        "--enable-dp-attention": bool(getattr(server_args, "enable_dp_attention", False)),
        "--enable-lora": bool(
            getattr(server_args, "enable_lora", None) or getattr(server_args, "lora_paths", None)
        ),
    }
    for option, is_used in refused.items():
        if is_used:
            raise ConfigError(f"this SGLang cannot use LMCache together with {option}")


def tokens_of(token_ids: Sequence[int]) -> array[int]:
    """A copy of what may be a list, or an array that grows on."""
    return array("I", token_ids)


def slots_of(indices: torch.Tensor) -> list[int]:
    """The pool's slots of a request's tokens, on the host."""
    slots: list[int] = indices.tolist()
    return slots


def absent_in(slots: Sequence[int]) -> int:
    """How many of the first tokens SGLang has itself: it gives no slot to load them into."""
    return next((n for n, slot in enumerate(slots) if slot >= 0), len(slots))
