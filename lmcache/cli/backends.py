"""`lmcache backends`: checks a storage backend with the kit its author used."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from xml.etree import ElementTree as ET

import typer

from lmcache.cli.output import Format, FormatOption, print_json
from lmcache.core.assembly import open_tier
from lmcache.core.errors import ConfigError
from lmcache.core.keys import ChunkKey
from lmcache.core.redact import redact_value

if TYPE_CHECKING:
    from lmcache.plugins.manager import PluginManager

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Check a storage backend."""


@app.command()
def check(
    ctx: typer.Context,
    url: Annotated[str, typer.Argument(help="Where to read and write; it may be in use.")],
    output: FormatOption = Format.TERMINAL,
) -> None:
    """Check that the backend at URL keeps every rule of storage backends.

    Exits with 1 if it breaks one, and with 2 if it cannot be checked.
    """
    plugins: PluginManager = ctx.obj
    for needed in ("pytest", "hypothesis"):
        if find_spec(needed) is None:
            raise ConfigError(f"checking a backend needs {needed}: install lmcache[testing]")
    with open_tier(url, plugins).backend as backend:
        # or each of the rules would say that nobody answers
        backend.contains(ChunkKey(bytes(32)))
    if output is Format.TERMINAL:
        raise typer.Exit(_run(_command(url)))
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.xml")
        code = _run([*_command(url), f"--junitxml={report}"], stdout=subprocess.DEVNULL)
        rules = _read(report) if report.exists() else []
    print_json({"url": redact_value(url), "passed": code == 0, "rules": rules})
    raise typer.Exit(code)


def _command(url: str) -> list[str]:
    # the settings of whatever project is in the current directory are not ours
    alone = ["-c", "/dev/null", "--noconftest", "-p", "no:cacheprovider"]
    shown = ["--no-header", "--tb=short", "-rfEs"]
    kit = ["-p", "lmcache.testing.plugin", "--pyargs", "lmcache.testing.check_url"]
    return [sys.executable, "-m", "pytest", *alone, *shown, *kit, "--lmcache-backend", url]


def _run(command: list[str], stdout: int | None = None) -> int:
    return subprocess.run(command, check=False, stdout=stdout).returncode  # noqa: S603 - ours


def _read(report: Path) -> list[dict[str, Any]]:
    """The rules in a JUnit report, each with its outcome and what went wrong."""
    rules = []
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - our own child wrote it
        failure = next(iter(case), None)
        rules.append(
            {
                "rule": case.get("name"),
                "outcome": "passed" if failure is None else failure.tag,
                "message": "" if failure is None else failure.get("message", ""),
            }
        )
    return rules
