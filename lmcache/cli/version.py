"""`lmcache version`."""

from __future__ import annotations

import platform

import lmcache
from lmcache.cli.output import Format, FormatOption, print_json


def version(output: FormatOption = Format.TERMINAL) -> None:
    """Show the version."""
    if output is Format.JSON:
        print_json({"lmcache": lmcache.__version__, "python": platform.python_version()})
    else:
        print(f"lmcache {lmcache.__version__}")
