"""What the server costs: copies of both kinds, lookups, many engines at once, a slab too small."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

SHAPE = "(2,1024,16,8,128):float16:32"
TOKENS = 2048
MODES = ("engine_driven", "lmcache_driven")
LOOKUPS = (2_048, 131_072)
CLIENTS = 64


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextlib.contextmanager
def served(program: list[str], *options: str, ready_s: float = 60) -> Iterator[tuple[int, int]]:
    """A server at ports of its own: `program` is how `lmcache` is run."""
    port, http = free_port(), free_port()
    command = [*program, "server", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--http-port", str(http), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    try:
        deadline = time.monotonic() + ready_s
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{http}/healthcheck", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, "the server has ended"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.1)
        yield port, http
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


OURS = [sys.executable, "-m", "lmcache"]


def bench(program: list[str], port: int, http: int, mode: str, requests: int, tokens: int) -> Any:
    """What `lmcache bench server` of a program says, as JSON."""
    output = Path(f"/tmp/lmcache-bench-{os.getpid()}.json")
    command = [*program, "bench", "server", "--rpc-url", f"tcp://127.0.0.1:{port}"]
    command += ["--url", f"http://127.0.0.1:{http}", "--mode", "cpu", "--transfer-mode", mode]
    command += ["--num-tokens", str(tokens), "--end", str(requests), "--interval", "0.1"]
    command += ["--kvcache-shape-spec", SHAPE, "--format", "json", "--output", str(output)]
    subprocess.run(
        command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=600
    )
    try:
        return json.loads(output.read_text())
    finally:
        output.unlink(missing_ok=True)


def copies(requests: int = 32) -> dict[str, Any]:
    """Store and retrieve of 268 MB in both modes, against one-thread memcpy in the same run."""
    figures: dict[str, Any] = {}
    for mode in MODES:
        with served(OURS, "--l1-size-gb", "1.2") as (port, http):
            said = bench(OURS, port, http, mode, requests, TOKENS)
        assert said["pass_rate"] == 100, said
        figures[mode] = {
            "store_ms": said["cold_store_ms"]["p50"],
            "retrieve_ms": said["warm_retrieve_ms"]["p50"],
            "steady_store_gb_s": said["steady_store_gb_s"],
            "steady_retrieve_gb_s": said["steady_retrieve_gb_s"],
            "first_pass_store_gb_s": said["first_pass_store_gb_s"],
            "memcpy_gb_s": said["memcpy_gb_s"],
            "store_over_memcpy": said["store_over_memcpy"],
            "retrieve_over_memcpy": said["retrieve_over_memcpy"],
        }
    return figures


def overcommitted(requests: int = 16) -> dict[str, Any]:
    """A working set of four times the memory: what passes."""
    figures = {}
    for mode in MODES:
        with served(OURS, "--l1-size-gb", "1") as (port, http):
            said = bench(OURS, port, http, mode, requests, TOKENS)
        figures[mode] = {"requests": said["requests"], "pass_rate": said["pass_rate"]}
    return figures


def lookups(times: int = 200) -> dict[str, Any]:
    """Round trips of lookups that find everything, and of 64 engines at once, in milliseconds."""
    from lmcache.cli.bench_engine import BenchEngine
    from lmcache.cli.bench_pages import BenchPages, parse_shapes

    figures: dict[str, Any] = {}
    with served(OURS, "--l1-size-gb", "0.5") as (port, _):
        url = f"tcp://127.0.0.1:{port}"
        pages = BenchPages(parse_shapes(f"(1,{LOOKUPS[-1] // 16},16,1,16):uint8:1"), lends=False)
        engine, other = (BenchEngine(pages, url, "auto", fresh=False) for _ in range(2))
        for tokens in LOOKUPS:
            for number in range(times // 4):
                engine.store(engine.chain(number, tokens), range(tokens // 16))
            chain = engine.chain(0, tokens)
            known = [engine.lookup(chain) for _ in range(times)]
            fresh = [engine.lookup(engine.chain(0, tokens)) for _ in range(times // 4)]
            others = [other.lookup(other.chain(n, tokens)) for n in range(times // 4)]
            cold = [engine.lookup(engine.chain(10**6 + n, tokens)) for n in range(times // 4)]
            assert {one.tokens for one in known + fresh + others} == {tokens}
            figures[str(tokens)] = {
                "asked_again_ms": _median(known),
                "new_request_ms": _median(fresh),
                "of_another_engine_ms": _median(others),
                "nothing_stored_ms": _median(cold),
            }
        engine.close()
        other.close()
        figures[f"{CLIENTS} engines, {LOOKUPS[0]}"] = _crowd(url, pages, times // 4)
    return figures


def _crowd(url: str, pages: Any, times: int) -> dict[str, float]:
    """Every engine on a thread of this process, all of them asking all the time."""
    from lmcache.cli.bench_engine import BenchEngine

    engines = [BenchEngine(pages, url, "auto") for _ in range(CLIENTS)]
    spent: list[float] = []

    def work(engine: Any) -> None:
        chain = engine.chain(1, LOOKUPS[0])
        engine.store(chain, range(LOOKUPS[0] // 16))
        for _ in range(times):
            found = engine.lookup(chain)
            assert found.tokens == LOOKUPS[0], found
            spent.append(found.seconds)

    threads = [threading.Thread(target=work, args=(engine,)) for engine in engines]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = time.perf_counter() - started
    for engine in engines:
        engine.close()
    assert len(spent) == CLIENTS * times, "an engine was not answered"
    ordered = sorted(spent)
    return {
        "p50_ms": statistics.median(ordered) * 1e3,
        "p99_ms": ordered[int(len(ordered) * 0.99)] * 1e3,
        "lookups_per_s": len(spent) / total,
    }


def _median(timed: list[Any]) -> float:
    return statistics.median(one.seconds for one in timed) * 1e3
