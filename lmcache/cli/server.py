"""`lmcache server`: one cache for all engines of this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

import lmcache
from lmcache.cli.l2_adapter import url_of
from lmcache.core.config import load_config
from lmcache.core.environment import environment_text
from lmcache.core.errors import ConfigError
from lmcache.core.log import init_logger

if TYPE_CHECKING:
    from lmcache.plugins.manager import PluginManager

MODES = ("auto", "engine_driven", "lmcache_driven")


def server(
    ctx: typer.Context,
    l1_size_gb: Annotated[float | None, typer.Option(help="Memory for chunks, in GiB.")] = None,
    eviction_policy: Annotated[
        str | None, typer.Option(help="LRU, or another of `lmcache plugins`.")
    ] = None,
    chunk_size: Annotated[int | None, typer.Option(help="Tokens in a chunk.")] = None,
    host: Annotated[str, typer.Option(help="Where engines connect.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where engines connect; 0 for any.")] = 5555,
    http_host: Annotated[str, typer.Option(help="Where people connect.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="Where people connect; 0 for any.")] = 8080,
    l2: Annotated[
        list[str] | None, typer.Option(help="URL of a slower tier; repeat for more, in order.")
    ] = None,
    l2_adapter: Annotated[
        list[str] | None, typer.Option(help="A slower tier as JSON, as LMCache/LMCache writes it.")
    ] = None,
    supported_transfer_mode: Annotated[
        str, typer.Option(help=f"Who copies: {', '.join(MODES)}.")
    ] = "auto",
    l1_prefault: Annotated[
        bool, typer.Option(help="Take all of that memory at the start, in the background.")
    ] = True,
    while_stdin: Annotated[
        bool, typer.Option("--while-stdin", help="End when standard input does.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without a token.")
    ] = False,
) -> None:
    """Share one cache between engines.

    What no option says comes from the configuration; see `lmcache config show`. The token that a
    wider bind needs is taken from LMCACHE_TOKEN.
    """
    from lmcache.core.service.serving import TRANSFER_MODES, Binding, serve

    plugins: PluginManager = ctx.obj
    chosen = {
        "lmcache.max_local_cpu_size": l1_size_gb,
        "lmcache.cache_policy": eviction_policy,
        "lmcache.chunk_size": chunk_size,
        "lmcache.l2": [*(l2 or ()), *map(url_of, l2_adapter or ())] or None,
    }
    loaded = load_config({key: value for key, value in chosen.items() if value is not None})
    modes = _modes(supported_transfer_mode, TRANSFER_MODES)
    init_logger(__name__)
    binding = Binding(
        host=host,
        port=port,
        http_host=http_host,
        http_port=http_port,
        modes=modes,
        token=environment_text("LMCACHE_TOKEN"),
        insecure=insecure,
        prefault=l1_prefault,
        while_stdin=while_stdin,
        release=lmcache.__version__,
    )
    serve(loaded.config, plugins, binding)


def _modes(wanted: str, known: tuple[str, ...]) -> tuple[str, ...]:
    if wanted == "auto":
        return known
    if wanted not in known:
        raise ConfigError(
            f"--supported-transfer-mode is {wanted!r}, expected auto or {' or '.join(known)}"
        )
    return (wanted,)
