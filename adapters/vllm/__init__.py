"""vLLM's KV connector, spoken to the core.

`connector` is what vLLM calls in-process, `mp_connector` what it calls with a server, and `hooks`
what both have in common, behind the `wall` that keeps our errors from the engine. They pass to
`scheduler` where vLLM schedules and to `worker` where the pages are; `step` is what travels between
the two; `translate` turns vLLM's objects into ours, and `groups` its page tables.
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
        engine="vllm",
        entry="lmcache.integration.vllm.vllm_v1_adapter:LMCacheConnectorV1Impl",
        versions=">=0.22,<0.34",
        summary="LMCacheConnectorV1 in-process, LMCacheMPConnector with a server",
    )
