"""`lmcache bench server` of LMCache/LMCache 0.5.6 beside ours, in one run and taking turns.

Installs its wheel into a virtual environment of its own (about 2 GB with torch). Each program
serves and measures itself: 2,048 tokens of 128 KiB each, both transfer modes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from service_costs import MODES, OURS, TOKENS, bench, served

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".cache" / "peer-lmcache"
WHEEL = "lmcache==0.5.6"
MEASURES = ("cold_lookup", "cold_store", "warm_lookup", "warm_retrieve")


def install() -> list[str]:
    """How the peer's `lmcache` is run."""
    program = VENV / "bin" / "lmcache"
    if not program.exists():
        print(f"==> Installing {WHEEL} into {VENV} (several minutes)")
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        pip = [VENV / "bin" / "pip", "install", "-q"]
        subprocess.run([*pip, "torch==2.13.0"], check=True)
        subprocess.run([*pip, WHEEL, "numpy"], check=True)
    return [str(program)]


def measure(program: list[str], *, is_ours: bool, mode: str, requests: int, gb: str) -> Any:
    """One run of one program: its medians in milliseconds, and what passed."""
    options = ["--l1-size-gb", gb, "--eviction-policy", "LRU"]
    if not is_ours:
        options += ["--supported-transfer-mode", "auto"]
    with served(program, *options, ready_s=120) as (port, http):
        said = bench(program, port, http, mode, requests, TOKENS)
    if is_ours:
        return {**{n: said[f"{n}_ms"]["p50"] for n in MEASURES}, "pass": said["pass_rate"]}
    metrics = said["metrics"]
    return {
        **{n: metrics[n][f"{n}_p50"] for n in MEASURES},
        "pass": metrics["results"]["pass_rate"],
    }


def main() -> None:
    """Print both columns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=12)
    chosen = parser.parse_args()
    theirs = install()
    results: dict[str, Any] = {}
    for gb, title in (("4", "fits"), ("1", "4x the memory")):
        for mode in MODES:
            rounds: dict[str, list[Any]] = {"ours": [], "LMCache 0.5.6": []}
            for _ in range(chosen.rounds):
                for name, program in (("ours", OURS), ("LMCache 0.5.6", theirs)):
                    rounds[name].append(
                        measure(
                            program,
                            is_ours=name == "ours",
                            mode=mode,
                            requests=chosen.requests if gb == "4" else 16,
                            gb=gb,
                        )
                    )
            results[f"{mode}, {title}"] = show(f"{mode}, working set {title}", rounds)
    folder = ROOT / "bench-results"
    folder.mkdir(exist_ok=True)
    (folder / "peer_lmcache.json").write_text(json.dumps(results, indent=2))


def show(title: str, rounds: dict[str, list[Any]]) -> Any:
    """Print medians of the rounds side by side, with their ratio."""
    names = [*MEASURES, "pass"]
    table = {
        name: {who: statistics.median(r[name] for r in runs) for who, runs in rounds.items()}
        for name in names
    }
    ours, theirs = rounds
    print(f"\n{title}\n  {'p50, ms':16}{ours:>16}{theirs:>16}{'ratio':>10}")
    for name, row in table.items():
        ratio = row[theirs] / row[ours] if row[ours] else 0.0
        print(f"  {name:16}{row[ours]:16.2f}{row[theirs]:16.2f}{ratio:10.2f}")
    sys.stdout.flush()
    return table


if __name__ == "__main__":
    main()
