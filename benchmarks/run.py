"""`make bench`: prints every figure of the README and writes them to `bench-results/`."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

ROOT = Path(__file__).resolve().parents[1]
ENGINES = frozenset(("vllm", "tiers", "sglang"))


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


def core(wanted: Collection[str]) -> dict[str, Any]:
    """What needs no other process."""
    import core_costs

    results: dict[str, Any] = {}
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
    return results


def service() -> dict[str, Any]:
    """What a server costs."""
    import service_costs

    results = {}
    for title, measure in (
        ("a server's lookups, round trips in milliseconds", service_costs.lookups),
        ("a server's copies of 268 MB against memcpy on one thread", service_costs.copies),
        ("a working set of four times the memory", service_costs.overcommitted),
    ):
        results[measure.__name__] = measure()
        show(title, results[measure.__name__])
    return results


def engines(wanted: Collection[str], model: str | None, tiers: list[str]) -> dict[str, Any]:
    """What is saved in real engines."""
    import sglang_costs
    import tier_costs
    import vllm_costs
    from model import prepare_model

    model = model or str(prepare_model())
    results: dict[str, Any] = {}
    if "vllm" in wanted:
        figures = results["vllm"] = vllm_costs.run(model)
        show("vLLM, requests without a hit, with the connector against without", figures["misses"])
        show("vLLM, a warm request against vLLM's own prefix hit", figures["hits"])
    if "tiers" in wanted:
        results["tiers"] = tier_costs.run(model, tiers)
        show("vLLM, time to the first token after all was killed", results["tiers"])
    if "sglang" in wanted:
        results["sglang"] = sglang_costs.run(model)
        show("SGLang, time to the first token", results["sglang"])
    return results


def main() -> None:
    """Run the groups that were asked for."""
    groups = ("copies", "lookups", "index", "service", *ENGINES)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", choices=[*groups, []], help="default: all")
    parser.add_argument("--model", help="a model for engines; default: the demo's")
    parser.add_argument("--tier", action="append", help="a URL for `tiers`; default: files")
    chosen = parser.parse_args()
    wanted = chosen.groups or groups

    sys.path.insert(0, str(ROOT / "examples"))
    results: dict[str, Any] = {"machine": platform.processor(), "python": platform.python_version()}
    results |= core(wanted)
    if "service" in wanted:
        results["service"] = service()
    if ENGINES.intersection(wanted):
        results |= engines(wanted, chosen.model, chosen.tier or [])

    folder = ROOT / "bench-results"
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    print(f"\nwritten to {folder / 'results.json'}")


if __name__ == "__main__":
    main()
