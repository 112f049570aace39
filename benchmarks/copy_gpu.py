"""Copies between a CUDA device and the host's memory, against a pinned memcpy in the same run.

    python benchmarks/copy_gpu.py

Runs `tests/gpu` first: a copy that is not right has no speed. Then prints, for each layout and
path, GB/s for stores, loads and both at once, and how much slower a decode loop gets while pages
are stored. Writes bench-results/copy_gpu.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import torch

from lmcache.core.kernels.cuda import CudaPages
from lmcache.core.kernels.paths import DIRECT, PATHS, forced_path
from lmcache.core.kernels.pinning import FIRST_BYTES
from lmcache.core.kernels.plan import Planner, Span
from lmcache.core.kernels.words import PROGRAMS
from lmcache.core.layout import PageLayout, region_of
from lmcache.core.slab import Slab

ROOT = Path(__file__).resolve().parent.parent
CHUNK = 256
ROUNDS = 7
DECODE_S = 0.3
"""Of the decode loop, alone and beside stores, in each of five turns."""

LAYOUTS = {
    # name: layers, page tokens, shape of a layer's tensor without pages, blocks first
    "vLLM 8 heads, 64 KiB": (32, 16, (8, 16, 256), False),
    "vLLM 4 heads, 32 KiB": (32, 16, (4, 16, 256), False),
    "MLA, 18 KiB": (32, 16, (16, 576), False),
    "vLLM 1 head (TP 8), 8 KiB": (32, 16, (1, 16, 256), False),
    "SGLang page 1, 2 KiB": (64, 1, (8, 128), False),
    "vLLM blocks first, 2 MiB": (32, 16, (8, 16, 256), True),
}


class Case:
    """Scattered pages of one layout, and spans for half of them and for the others."""

    def __init__(self, name, size, device):
        layers, tokens, inner, blocks_first = LAYOUTS[name]
        page = 2
        for count in inner:
            page *= count
        chunk_pages = CHUNK // tokens
        chunks = max(1, size // (chunk_pages * page * layers))
        self.pages = 2 * chunks * chunk_pages
        shape = (self.pages, layers, *inner) if blocks_first else (layers, self.pages, *inner)
        self.memory = torch.randn(shape, device=device, dtype=torch.bfloat16)
        views = self.memory.unbind(1 if blocks_first else 0)
        regions = [
            region_of(
                f"layer {index}",
                view.data_ptr(),
                view.shape,
                view.stride(),
                itemsize=2,
                dtype="bfloat16",
                page_axis=0,
            )
            for index, view in enumerate(views)
        ]
        self.layout = PageLayout(tuple(regions), tokens, name)
        slot = chunk_pages * page * layers
        ids = torch.randperm(self.pages).view(2 * chunks, chunk_pages).tolist()
        # behind the first piece that is pinned: what lies in two of them takes another path
        spans = [
            Span(FIRST_BYTES + index * slot, chunk_pages, 0, part) for index, part in enumerate(ids)
        ]
        self.spans, self.others = spans[:chunks], spans[chunks:]
        self.size = chunks * slot


def median(call):
    """Seconds of a call, after two that do not count."""
    times = []
    for index in range(2 + ROUNDS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if index > 1:
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def memcpy(size, device):
    """GB/s of one large pinned copy, out and in and both at once."""
    host = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    there = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def both():
        for (target, source), stream in zip(
            ((host[0], there[0]), (there[1], host[1])), streams, strict=True
        ):
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)

    return {
        "store": size / median(lambda: host[0].copy_(there[0], non_blocking=True)) / 1e9,
        "load": size / median(lambda: there[1].copy_(host[1], non_blocking=True)) / 1e9,
        "both": 2 * size / median(both) / 1e9,
    }


def pinned(copies):
    """Wait until all of its slab is."""
    copies._pins._thread.join()
    with copies._pins.held() as ends:
        if not len(ends):
            raise SystemExit("the slab cannot be pinned, as the log says")
    return copies


def driver_version():
    """As people know it; empty where nobody says."""
    program = shutil.which("nvidia-smi")
    if not program:
        return ""
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    return said.partition("\n")[0].strip()


def at_once(*calls):
    """Run calls on a thread each; what one of them raises is raised here."""
    with ThreadPoolExecutor(len(calls)) as pool:
        for running in [pool.submit(call) for call in calls]:
            running.result()


def decode_loop(device):
    """Replays a step that reads 2 GiB of weights, as a graph: launching is not to be its time."""
    weights = torch.randn(64, 4096, 4096, device=device, dtype=torch.bfloat16)
    state = torch.randn(4096, 8, device=device, dtype=torch.bfloat16)
    product = torch.mm(weights[0], state)  # what cuBLAS needs is there before the graph is made
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for weight in weights:
            torch.mm(weight, state, out=product)
    return graph, (weights, state, product)


def step_ms(graph, seconds):
    """Milliseconds of a step, in the median of so many seconds."""
    times, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def decode_slowdown(copies, case, device):
    """How much longer the steps of a decode loop take while pages are stored, in percent."""
    graph, _kept = decode_loop(device)
    step_ms(graph, DECODE_S)
    alone, together, begun, stop = [], [], threading.Event(), threading.Event()

    def store():
        while not stop.is_set():
            copies.copy(case.spans, None, to_slab=True)
            begun.set()

    for _ in range(5):
        alone.append(step_ms(graph, DECODE_S))
        begun.clear()
        stop.clear()
        with ThreadPoolExecutor(1) as pool:
            storing = pool.submit(store)
            try:
                begun.wait(60)
                together.append(step_ms(graph, DECODE_S))
            finally:
                stop.set()
            storing.result()
    return 100 * (statistics.median(together) / statistics.median(alone) - 1)


def measure(layout, size, device, plain):
    """One row for each path, and one for what is chosen by measurement."""
    case = Case(layout, size, device)
    slab = Slab.create(FIRST_BYTES + 2 * case.size + (1 << 20))
    copies = pinned(CudaPages(case.layout, Planner(case.layout), slab, device, 4))
    rows = {}
    for path in (*PATHS, ""):
        copies.paths.forced = path
        store = median(lambda: copies.copy(case.spans, None, to_slab=True))
        load = median(lambda: copies.copy(case.spans, None, to_slab=False))
        both = median(
            lambda: at_once(
                lambda: copies.copy(case.spans, None, to_slab=True),
                lambda: copies.copy(case.others, None, to_slab=False),
            )
        )
        speeds = {
            "store": case.size / store / 1e9,
            "load": case.size / load / 1e9,
            "both": 2 * case.size / both / 1e9,
        }
        name = path or "chosen"
        row = rows[name] = {
            **{f"{key}_gb_s": value for key, value in speeds.items()},
            **{f"{key}_of_memcpy": value / plain[key] for key, value in speeds.items()},
            "programs": 0 if path == DIRECT else PROGRAMS,
            "decode_slowdown_percent": decode_slowdown(copies, case, device),
        }
        print(
            f"  {name:8s}",
            "  ".join(f"{k} {v:.2f}" for k, v in row.items()),
            flush=True,
        )
    copies.close()
    slab.close()
    return rows


def main():
    """Verify, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="of each layout")
    parser.add_argument("--no-tests", action="store_true", help="they have just been run")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    if forced_path():
        raise SystemExit("unset LMCACHE_COPY_PATH: all paths are measured")
    if not arguments.no_tests:
        # another torch than the one of our CI may warn of something that is no error
        tests = [sys.executable, "-m", "pytest", "-q", "-W", "default", ROOT / "tests/gpu"]
        subprocess.run(tests, check=True)
    device = torch.device("cuda", torch.cuda.current_device())
    size = arguments.mib << 20
    results = {
        "device": torch.cuda.get_device_name(device),
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
        "driver": driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "memcpy_gb_s": memcpy(size, device),
        "layouts": {},
    }
    print(results)
    written = ROOT / "bench-results" / "copy_gpu.json"
    written.parent.mkdir(exist_ok=True)
    for name in LAYOUTS:
        print(name, flush=True)
        results["layouts"][name] = measure(name, size, device, results["memcpy_gb_s"])
        torch.cuda.empty_cache()
        written.write_text(json.dumps(results, indent=2))  # whoever is cut off has the others
    print(f"written to {written}")


if __name__ == "__main__":
    main()
