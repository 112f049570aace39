"""Names that vLLM's own MP connector imports before it hands over to ours.

That connector would drive these classes itself if it were used; it copies by CUDA events we have no
part in, so whoever makes one of them is told what to use instead.
"""

from __future__ import annotations

from typing import Any, NoReturn

from lmcache.core.errors import ConfigError


def mla_enabled(model_config: Any) -> bool:
    """Whether the model keeps one latent per token instead of keys and values."""
    return bool(getattr(model_config, "use_mla", False))


class _NotDriven:
    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(
            "vLLM's built-in LMCache connector cannot be used with this package: unset "
            "LMCACHE_USE_UPSTREAM_MP, and with vLLM before 0.22 set kv_connector_module_path to "
            "lmcache.integration.vllm.lmcache_mp_connector"
        )


class LMCacheMPSchedulerAdapter(_NotDriven):
    """What the built-in connector would use where vLLM schedules."""


class LMCacheMPWorkerAdapter(_NotDriven):
    """What the built-in connector would use in every worker."""


class LoadStoreOp(_NotDriven):
    """One copy of the built-in connector."""


class ParallelStrategy(_NotDriven):
    """How the built-in connector describes an engine's ranks."""


class BlockAllocationRecord(_NotDriven):
    """How the built-in connector reports an engine's pages."""
