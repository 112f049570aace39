"""SGLang's `--enable-lmcache`, spoken to the core.

SGLang has a radix tree of its own and asks what lies beyond it, in the process of every rank. Each
rank is an engine of one mover, with its share of the heads, and they agree on the least that any of
them has found.

`connector` is what SGLang calls in-process, `mp_connector` what it calls with a server, and
`unified` what it calls from 0.5.21 on, with a server too. All of them are `joined` to a cache, by a
`scheduler` that asks it and a `worker` that copies; `ranks` agree, and `translate` turns SGLang's
objects into ours.
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
        engine="sglang",
        entry="lmcache.integration.sglang.sglang_adapter:LMCacheLayerwiseConnector",
        versions=">=0.5.2,<0.5.24",
        summary="--enable-lmcache: in-process layer by layer, or with a server",
    )
