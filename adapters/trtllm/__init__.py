"""TensorRT-LLM's KV cache connector, spoken to the core.

TensorRT-LLM asks on its leader, and copies on every rank. `hooks` has what it calls, behind the
wall that keeps our errors from it: `connector` with a cache in the leader's process, `mp_connector`
with a server. They pass to `scheduler` on the leader and to `worker` on every rank; `step` is what
travels between the two, and by `asking` the leader has ranks copy at once. `meeting` tells the
ranks of one engine how to find each other, and `translate` turns TensorRT-LLM's objects into ours.
`api` is where TensorRT-LLM keeps its classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache.plugins import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lmcache.plugins.hookspecs import AdapterSpec


@hookimpl
def lmcache_adapters() -> Iterable[AdapterSpec]:
    """The connectors."""
    from lmcache.plugins.hookspecs import AdapterSpec

    yield AdapterSpec(
        engine="tensorrt_llm",
        entry="lmcache.integration.tensorrt_llm.tensorrt_adapter:LMCacheKvConnectorScheduler",
        versions=">=1.2",
        summary="the presets lmcache, in-process, and lmcache-mp, with a server",
    )
