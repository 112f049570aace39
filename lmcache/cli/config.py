"""`lmcache config`: what is configured, and what may be."""

from __future__ import annotations

import json
from typing import Any

import typer

from lmcache.cli.output import Format, FormatOption, print_json, table
from lmcache.core.config import load_config
from lmcache.core.config_keys import Config, expected
from lmcache.core.environment import PREFIX, VARIABLES
from lmcache.core.upstream_names import IGNORED_KEYS

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Show the effective configuration, and what may be configured."""


@app.command()
def show(output: FormatOption = Format.TERMINAL) -> None:
    """Show the value of each key and where it came from, without secrets."""
    loaded = load_config()
    settings = loaded.settings()
    if output is Format.JSON:
        values = {s.key: {"value": s.value, "source": s.source} for s in settings}
        print_json({"config": values, "ignored": loaded.ignored})
    else:
        rows = [(s.key, _as_text(s.value), s.source) for s in settings]
        print(table(("KEY", "VALUE", "SOURCE"), rows))


@app.command()
def docs() -> None:
    """Print the reference of all keys, in Markdown."""
    print(reference(), end="")


def reference() -> str:
    """The text of `docs/configuration.md`."""
    keys = [
        (f"`{key}`", expected(key), f"`{_as_text(field.default)}`", field.description)
        for key, field in Config.model_fields.items()
    ]
    variables = [(f"`{name}`", meaning) for name, meaning in VARIABLES.items()]
    return _REFERENCE.format(
        prefix=PREFIX,
        keys=_markdown_table(("Key", "Value", "Default", "Meaning"), keys),
        variables=_markdown_table(("Variable", "Meaning"), variables),
        ignored=", ".join(f"`{key}`" for key in sorted(IGNORED_KEYS)),
    )


def _as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value) or "none"
    if value is None:
        return "none"
    return value if value and isinstance(value, str) else json.dumps(value, default=str)


def _markdown_table(header: tuple[str, ...], rows: list[Any]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_REFERENCE = """\
# Configuration

<!-- written by `lmcache config docs`; a test keeps it current -->

Every setting has one flat key. It may be given in four places; a later one wins:

1. the default,
2. the YAML file that `LMCACHE_CONFIG_FILE` names: `chunk_size: 256`,
3. the environment, with `{prefix}` and in upper case: `LMCACHE_CHUNK_SIZE=256`,
4. the engine's own options, for vLLM `kv_connector_extra_config`: `"lmcache.chunk_size": 256`. Keys
   without `lmcache.` belong to the engine.

The same text means the same in all of them; flags may be written true, yes, on or 1, and false,
no, off or 0. `lmcache config show` prints each value with the place it came from, and hides
secrets.

A key or an `LMCACHE_` variable that is not known stops the start-up with the name of the nearest
one that is, and so does a value that cannot be used. Variables that Kubernetes adds for a service
whose name begins with `lmcache` are left alone.

## Keys

{keys}

## Environment variables that are not keys

{variables}

## Keys that mean nothing here

LMCache/LMCache has these keys besides. They are accepted, so that its configurations load, and
named in one warning with the places they came from. The same holds for everything that begins with
`ec_`, `nixl_peer_` or `mp.`.

{ignored}
"""
