"""`lmcache plugins`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer  # noqa: TC002 - typer reads the annotations when the command is made

from lmcache.cli.output import Format, FormatOption, print_json, table

if TYPE_CHECKING:
    from lmcache.plugins.manager import PluginManager
    from lmcache.plugins.offers import Offers


def plugins(ctx: typer.Context, output: FormatOption = Format.TERMINAL) -> None:
    """List the plugins, and all that they offer."""
    manager: PluginManager = ctx.obj
    offers: dict[str, Offers[Any]] = {
        "backends": manager.backends,
        "policies": manager.policies,
        "codecs": manager.codecs,
        "adapters": manager.adapters,
        "commands": manager.commands,
    }
    if output is Format.JSON:
        listing = {kind: _describe(offered) for kind, offered in offers.items()}
        print_json({"plugins": [asdict(plugin) for plugin in manager.plugins()], **listing})
        return
    header = ("PLUGIN", "DISTRIBUTION", "VERSION", "HOOKS")
    rows = [(p.name, p.distribution, p.version, ", ".join(p.hooks)) for p in manager.plugins()]
    print(table(header, rows))
    for kind, offered in offers.items():
        if offered:
            facts = [(o["name"], o["plugin"], o["summary"]) for o in _describe(offered)]
            print("\n" + table((kind.upper(), "PLUGIN", "SUMMARY"), facts))


def _describe(offered: Offers[Any]) -> list[dict[str, Any]]:
    described = []
    for name, spec in offered.items():
        # what can be called means nothing to a reader
        facts = {key: value for key, value in vars(spec).items() if not callable(value)}
        described.append({"name": name, **facts, "plugin": offered.owner(name).name})
    return described
