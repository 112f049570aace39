"""`lmcache bench`: measures what a server or a backend does, and checks every byte of it."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmcache.cli.bench_backend import backend
from lmcache.cli.http import Remote, Target
from lmcache.cli.output import Format, FormatOption
from lmcache.cli.timing import Plain, spread
from lmcache.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lmcache.cli.bench_engine import BenchEngine

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)

OPERATIONS = ("cold_lookup", "cold_store", "warm_lookup", "warm_retrieve")
MODES = ("auto", "engine_driven", "lmcache_driven")
WIDTH = 64


@app.callback()
def _group() -> None:
    """Measure."""


app.command()(backend)


@app.command()
def server(
    rpc_url: Annotated[str, typer.Option(help="Where engines connect.")] = "tcp://localhost:5555",
    url: Annotated[
        str | None, typer.Option(help="Where people connect: if given, it must be ready.")
    ] = None,
    mode: Annotated[str, typer.Option(help="Where the pages are: cpu, gpu.")] = "cpu",
    transfer_mode: Annotated[str, typer.Option(help=f"Who copies: {', '.join(MODES)}.")] = "auto",
    num_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a request.")] = 512,
    start: Annotated[int, typer.Option(min=0, help="Number of the first request.")] = 0,
    end: Annotated[int | None, typer.Option(help="Stop before it; by default never.")] = None,
    interval: Annotated[float, typer.Option(min=0, help="Seconds between requests.")] = 0.5,
    kvcache_shape_spec: Annotated[
        str | None, typer.Option(help="(K and V, blocks, block size, heads, head size):type:layers")
    ] = None,
    num_blocks: Annotated[int, typer.Option(min=1, help="Blocks, if no shape says it.")] = 1024,
    block_size: Annotated[int, typer.Option(min=1, help="Their tokens, likewise.")] = 16,
    output_format: FormatOption = Format.TERMINAL,
    output: Annotated[Path | None, typer.Option(help="Write the result there too.")] = None,
) -> None:
    """Store and retrieve generated pages, timed and compared byte for byte."""
    from lmcache.cli.bench_engine import BenchEngine
    from lmcache.cli.bench_pages import BenchPages, DevicePages, parse_shapes

    _check(mode, transfer_mode)
    if url:
        Remote(Target.KVCACHE, url).check("/readyz")
    spec = kvcache_shape_spec or f"(2,{num_blocks},{block_size},8,128):float16:32"
    shapes = parse_shapes(spec)
    needed = -(-num_tokens // shapes[0].block_size)
    if 2 * needed > shapes[0].blocks:
        raise ConfigError(f"{num_tokens} tokens twice need {2 * needed} blocks")
    lends = transfer_mode == "lmcache_driven"
    on_gpu = mode == "gpu"
    pages = DevicePages(shapes, "cuda", lends=lends) if on_gpu else BenchPages(shapes, lends=lends)
    engine = BenchEngine(pages, rpc_url, transfer_mode)
    try:
        requests = _run(engine, num_tokens, needed, _numbers(start, end), interval)
        capacity = engine.client.about.capacity_bytes
    finally:
        engine.close()
    result = summarise(requests, needed * pages.block_bytes, capacity)
    result["config"] = {
        "rpc_url": rpc_url,
        "mode": mode,
        "transfer_mode": transfer_mode,
        "num_tokens": num_tokens,
        "interval": interval,
        "kvcache_shape_spec": spec,
    }
    text = json.dumps(result, indent=2) if output_format is Format.JSON else _terminal(result)
    print(text)
    if output:
        output.write_text(text + "\n", encoding="utf-8")
    raise typer.Exit(1 if result["checksum_fail"] else 0)


def _check(mode: str, transfer_mode: str) -> None:
    if mode not in ("cpu", "gpu"):
        raise ConfigError(f"--mode is {mode!r}, expected cpu or gpu")
    if transfer_mode not in MODES:
        raise ConfigError(f"--transfer-mode is {transfer_mode!r}, expected {', '.join(MODES)}")


def _numbers(start: int, end: int | None) -> Iterable[int]:
    return itertools.count(start) if end is None else range(start, end)


def _run(
    engine: BenchEngine, tokens: int, blocks: int, numbers: Iterable[int], interval: float
) -> list[dict[str, Any]]:
    """One record for each request; Ctrl-C ends them early."""
    records = []
    plain = Plain(blocks * engine.pages.block_bytes)
    try:
        for number in numbers:
            record = _request(engine, number, tokens, blocks)
            records.append({**record, "memcpy": plain.copy()})
            time.sleep(interval)
    except KeyboardInterrupt:
        print()
    return records


def _request(engine: BenchEngine, number: int, tokens: int, blocks: int) -> dict[str, Any]:
    half = engine.pages.blocks // 2
    first = number * blocks % max(1, half - blocks + 1)
    source, target = range(first, first + blocks), range(half + first, half + first + blocks)
    chain = engine.chain(number, tokens)
    whole = tokens - tokens % engine.client.geometry.page_tokens
    engine.pages.vary(source, number)
    expected = engine.pages.checksums(source)[: whole // engine.client.geometry.page_tokens]
    cold = engine.lookup(chain)
    stored = engine.store(chain, source)
    engine.pages.poison(target)
    lookup, retrieved = engine.retrieve(chain, target)
    found = engine.pages.checksums(target)[: len(expected)]
    return {
        "cold_lookup": cold.seconds,
        "cold_store": stored.seconds,
        "warm_lookup": lookup.seconds,
        "warm_retrieve": retrieved.seconds,
        "ok": cold.tokens == 0 and retrieved.tokens == whole and found == expected,
    }


def summarise(requests: list[dict[str, Any]], size: int, capacity: int) -> dict[str, Any]:
    """What the requests were like.

    Memory is slow when it is touched for the first time: what is stored before `capacity` bytes are
    full is the first pass, what comes after it is the steady state.
    """
    passed = sum(request["ok"] for request in requests)
    first_pass = -(-capacity // size)
    result: dict[str, Any] = {
        "requests": len(requests),
        "checksum_ok": passed,
        "checksum_fail": len(requests) - passed,
        "pass_rate": 100.0 * passed / len(requests) if requests else 0.0,
    }
    for name in OPERATIONS:
        result[f"{name}_ms"] = spread([request[name] * 1e3 for request in requests])
    result["bytes_per_request"] = size
    for name, operation in (("store", "cold_store"), ("retrieve", "warm_retrieve")):
        times = [request[operation] for request in requests]
        result[f"{name}_gb_s"] = _rate(size, times)
        result[f"first_pass_{name}_gb_s"] = _rate(size, times[:first_pass])
        result[f"steady_{name}_gb_s"] = _rate(size, times[first_pass:])
        ratios = [r["memcpy"] / r[operation] for r in requests[first_pass:] or requests]
        result[f"{name}_over_memcpy"] = statistics.median(ratios) if ratios else 0.0
    copied = [request["memcpy"] for request in requests]
    result["memcpy_gb_s"] = _rate(size, copied[first_pass:] or copied)
    return result


def _rate(size: int, times: list[float]) -> float:
    """GB/s by the median; 0 if nothing was measured."""
    return size / statistics.median(times) / 1e9 if times else 0.0


def _terminal(result: dict[str, Any]) -> str:
    config = result["config"]
    lines = [
        " Server Bench Result ".center(WIDTH, "="),
        " Configuration ".center(WIDTH, "-"),
        _line("RPC URL:", config["rpc_url"]),
        _line("Mode:", config["mode"]),
        _line("Transfer mode:", config["transfer_mode"]),
        _line("Tokens / request:", config["num_tokens"]),
        _line("Interval (s):", config["interval"]),
        " Results ".center(WIDTH, "-"),
        _line("Total requests:", result["requests"]),
        _line("Checksum OK:", result["checksum_ok"]),
        _line("Checksum FAIL:", result["checksum_fail"]),
        _line("Pass rate (%):", f"{result['pass_rate']:.2f}"),
        _line("Bytes / request:", result["bytes_per_request"]),
        _line("Memcpy, one thread (GB/s):", f"{result['memcpy_gb_s']:.2f}"),
    ]
    for name in ("store", "retrieve"):
        parts = [result[f"{kind}{name}_gb_s"] for kind in ("", "first_pass_", "steady_")]
        shown = " / ".join(f"{part:.2f}" if part else "-" for part in parts)
        lines.append(_line(f"{name.title()}, first pass, steady:", f"{shown} GB/s"))
    for name in OPERATIONS:
        lines.append(f" {name.replace('_', ' ').title()} (ms) ".center(WIDTH, "-"))
        lines += [
            _line(f"{key}:", value if key == "count" else f"{value:.3f}")
            for key, value in result[f"{name}_ms"].items()
        ]
    return "\n".join([*lines, "=" * WIDTH])


def _line(label: str, value: object) -> str:
    return f"{label:<{WIDTH // 2}}{value}"
