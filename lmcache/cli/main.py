"""`lmcache`: finds the commands among the plugins and runs one of them.

Listing the commands imports none of them; an error of ours is one line, without a traceback.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

import lmcache
from lmcache.core.errors import LMCacheError
from lmcache.core.redact import redact_text
from lmcache.installation import check_installation
from lmcache.plugins.loading import PluginInfo, blame
from lmcache.plugins.manager import PluginManager

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.plugins.hookspecs import CommandSpec

EXIT_ERROR = 2

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


class _LazyCommand(TyperCommand):
    """Stands for a command in the help, and becomes it when it is run."""

    def __init__(self, spec: CommandSpec, plugin: PluginInfo) -> None:
        super().__init__(spec.name, help=spec.summary)
        self._spec = spec
        self._plugin = plugin

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        with blame(self._plugin, f"cannot load the command {self.name}", passing=(LMCacheError,)):
            loaded = self._spec.load()
        if not isinstance(loaded, typer.Typer):
            function, loaded = loaded, typer.Typer(add_completion=False, rich_markup_mode=None)
            loaded.command(self.name)(function)
        return get_command(loaded).make_context(info_name, args, parent=parent, **extra)


def _show_version(*, wanted: bool) -> None:
    if wanted:
        print(f"lmcache {lmcache.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Keep KV caches outside the engine that computed them."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    try:
        check_installation()
        plugins = PluginManager()
        group: Any = get_command(app)
        for name, spec in plugins.commands.items():
            group.add_command(_LazyCommand(spec, plugins.commands.owner(name)))
        group.main(args, prog_name="lmcache", obj=plugins)
    except LMCacheError as exc:
        print(f"lmcache: {' '.join(redact_text(str(exc)).split())}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
