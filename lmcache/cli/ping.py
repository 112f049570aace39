"""`lmcache ping`: whether a server or an engine lives."""

from __future__ import annotations

import sys
import time

import typer

from lmcache.cli.http import Remote, Target, TargetArgument, UrlOption
from lmcache.cli.output import Format, FormatOption, print_json, table
from lmcache.core.errors import ServiceError

HEALTH = {Target.KVCACHE: "/healthcheck", Target.ENGINE: "/health"}


def ping(
    target: TargetArgument = Target.KVCACHE,
    url: UrlOption = None,
    output: FormatOption = Format.TERMINAL,
) -> None:
    """Ask a server or an engine whether it lives. The exit code is 1 if it does not."""
    remote = Remote(target, url)
    failure: ServiceError | None = None
    started = time.perf_counter()
    try:
        remote.check(HEALTH[target])
    except ServiceError as error:
        failure = error
    took = None if failure else round((time.perf_counter() - started) * 1e3, 2)
    status = "FAIL" if failure else "OK"
    if output is Format.JSON:
        print_json({"url": remote.url, "status": status, "round_trip_time_ms": took})
    else:
        print(table(("Status", status), [("Round trip time (ms)", "none" if failure else took)]))
    if failure:
        print(f"lmcache: {failure}", file=sys.stderr)
        raise typer.Exit(1)
