"""`lmcache describe`: what a server holds and whom it serves, or what an engine runs."""

from __future__ import annotations

import msgspec

from lmcache.cli.http import Remote, Target, TargetArgument, UrlOption
from lmcache.cli.output import Format, FormatOption, print_json, table
from lmcache.cli.ping import HEALTH
from lmcache.core.errors import ServiceError

GIB = 1 << 30


class Memory(msgspec.Struct):
    """A server's memory."""

    capacity_bytes: int
    free_bytes: int
    chunks: int
    leases: int


class TierState(msgspec.Struct):
    """A slower tier."""

    name: str
    awake: bool
    failures_in_a_row: int


class EngineState(msgspec.Struct):
    """An engine that is attached to a server."""

    name: str
    movers: int
    chunk_tokens: int
    bytes_per_token: int
    steps_in_the_air: int


class Status(msgspec.Struct):
    """What a server says of itself, as far as it is shown."""

    release: str
    chunk_size: int
    transfer_modes: list[str]
    eviction_policy: str
    l1: Memory
    tiers: list[TierState]
    engines: list[EngineState]


class Model(msgspec.Struct):
    """A model that an engine runs, or an adapter of one."""

    id: str
    max_model_len: int | None = None


class Models(msgspec.Struct):
    """All that an engine runs."""

    data: list[Model]


def describe(
    target: TargetArgument = Target.KVCACHE,
    url: UrlOption = None,
    output: FormatOption = Format.TERMINAL,
) -> None:
    """Show what a server holds and whom it serves, or what an engine runs."""
    remote = Remote(target, url)
    if target is Target.KVCACHE:
        _describe_server(remote, output)
    else:
        _describe_engine(remote, output)


def _describe_server(remote: Remote, output: Format) -> None:
    status = remote.ask("/status", Status)
    health = "OK" if all(tier.awake for tier in status.tiers) else "DEGRADED"
    if output is Format.JSON:
        print_json({"health": health, "url": remote.url, **msgspec.to_builtins(status)})
        return
    print(table(("Health", health), [("URL", remote.url), *_facts(status)]))
    if status.engines:
        header = ("ENGINE", "MOVERS", "CHUNK TOKENS", "BYTES PER TOKEN", "STEPS IN THE AIR")
        print("\n" + table(header, map(msgspec.structs.astuple, status.engines)))


def _facts(status: Status) -> list[tuple[str, object]]:
    memory = status.l1
    used = memory.capacity_bytes - memory.free_bytes
    percent = 100 * used / max(memory.capacity_bytes, 1)
    tiers = [t.name if t.awake else f"{t.name} (left alone after failures)" for t in status.tiers]
    return [
        ("Release", status.release),
        ("Chunk size", status.chunk_size),
        ("L1 capacity (GB)", f"{memory.capacity_bytes / GIB:.2f}"),
        ("L1 used (GB)", f"{used / GIB:.2f} ({percent:.1f}%)"),
        ("Eviction policy", status.eviction_policy),
        ("Cached chunks", memory.chunks),
        ("Active leases", memory.leases),
        ("Transfer modes", ", ".join(status.transfer_modes)),
        ("Tiers", ", ".join(tiers) or "none"),
    ]


def _describe_engine(remote: Remote, output: Format) -> None:
    models = remote.ask("/v1/models", Models).data
    status = "OK"
    try:
        remote.check(HEALTH[Target.ENGINE])
    except ServiceError:  # its front may live longer than what runs the model
        status = "FAIL"
    if output is Format.JSON:
        print_json({"status": status, "url": remote.url, "models": msgspec.to_builtins(models)})
        return
    rows: list[tuple[str, object]] = [("URL", remote.url)]
    for model in models:
        rows += [("Model", model.id), ("Max context", model.max_model_len or "unknown")]
    print(table(("Status", status), rows))
