"""`make bench`: prints every figure of the README and writes them to `bench-results/`."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def show(title: str, figures: dict[str, Any]) -> None:
    """Print one group of figures."""
    print(f"\n{title}")
    for name, value in figures.items():
        print(f"  {name:28} {_text(value)}")
    sys.stdout.flush()


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {number:.3f}" for key, number in value.items())
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run the groups that were asked for."""
    groups = ("copies", "lookups", "index", "service", "vllm", "tiers", "sglang")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", choices=[*groups, []], help="default: all")
    parser.add_argument("--model", help="a model for engines; default: the demo's")
    parser.add_argument("--tier", action="append", help="a URL for `tiers`; default: files")
    chosen = parser.parse_args()
    wanted = chosen.groups or groups

    sys.path.insert(0, str(ROOT / "examples"))
    import core_costs
    import service_costs
    import sglang_costs
    import tier_costs
    import vllm_costs

    results: dict[str, Any] = {"machine": platform.processor(), "python": platform.python_version()}
    if "copies" in wanted:
        results["copies"] = core_costs.copies()
        show("copy path against memcpy of the same bytes", results["copies"])
        results["plans"] = core_costs.plans()
        show("planning 100,000 runs", results["plans"])
    if "lookups" in wanted:
        results["lookups"] = core_costs.lookups()
        show("lookup of a prompt that is all stored, milliseconds", results["lookups"])
    if "index" in wanted:
        for policy in ("LRU", "S3FIFO", "ARC"):
            figures = results[f"index {policy}"] = core_costs.index(policy)
            show(f"index with a million chunks, {policy}", figures)
    if "service" in wanted:
        results["service"] = {}
        for title, measure in (
            ("a server's lookups, round trips in milliseconds", service_costs.lookups),
            ("a server's copies of 268 MB against memcpy on one thread", service_costs.copies),
            ("a working set of four times the memory", service_costs.overcommitted),
        ):
            figures = results["service"][measure.__name__] = measure()
            show(title, figures)
    if {"vllm", "tiers", "sglang"}.intersection(wanted):
        from model import prepare_model

        model = chosen.model or str(prepare_model())
    if "vllm" in wanted:
        results["vllm"] = vllm_costs.run(model)
        show(
            "vLLM, requests without a hit, with the connector against without",
            results["vllm"]["misses"],
        )
        show("vLLM, a warm request against vLLM's own prefix hit", results["vllm"]["hits"])
    if "tiers" in wanted:
        results["tiers"] = tier_costs.run(model, chosen.tier or [])
        show("vLLM, time to the first token after all was killed", results["tiers"])
    if "sglang" in wanted:
        results["sglang"] = sglang_costs.run(model)
        show("SGLang, time to the first token of 2,100 tokens", results["sglang"])

    folder = ROOT / "bench-results"
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    print(f"\nwritten to {folder / 'results.json'}")


if __name__ == "__main__":
    main()
