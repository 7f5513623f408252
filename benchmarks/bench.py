"""The regression benchmark: the embedded model through the recipes and their baselines, against committed figures.

    python benchmarks/bench.py           writes latest.json, prints the differences, exits 1 on a regression
    python benchmarks/bench.py --accept  makes the latest figures the baseline

Perplexity is deterministic and held tightly; time is a ratio to one plain forward pass of the same run, held loosely.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from common import HERE, PLAIN, measure, perplexity, ratio
from rich.console import Console
from rich.table import Table

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "w4a4kv4": ("w4a4kv4", {}),
    "w3a16": ("w3a16", {}),
    "w2a16": ("w2a16", {}),
    "w2a16 gptq": ("w2a16", PLAIN),
    "w2a16 rtn": ("w2a16", {"weights.method": "rtn"}),
}
WORSE = {"perplexity": 1.003, "ratio": 2.0, "peak_memory_bytes": 1.3}
"""How many times its baseline a figure may become: another processor sums in another order."""


def run() -> dict[str, Any]:
    """Measure every case."""
    results = {}
    for name, (recipe, changes) in CASES.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        report = measure(recipe, changes)
        results[name] = {
            "perplexity": perplexity(report),
            "ratio": ratio(report),
            "peak_memory_bytes": report["peak_memory_bytes"]["host"],
        }
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "results": results,
    }


def compare(latest: dict[str, Any], baseline: dict[str, Any]) -> tuple[Table, list[str]]:
    """A table of both, and the regressions in words."""
    table = Table("case", "figure", "baseline", "latest", "change")
    regressions = []
    for case, figures in baseline["results"].items():
        for figure, old in figures.items():
            new = latest["results"].get(case, {}).get(figure)
            if new is None:
                regressions.append(f"{case}: no {figure}")
                continue
            bad = new > old * WORSE[figure]
            if bad:
                regressions.append(f"{case}: {figure} rose from {old:.4g} to {new:.4g}")
            shown = [f"{value / 2**20:.0f} MiB" if figure.endswith("bytes") else f"{value:.3f}" for value in (old, new)]
            table.add_row(
                case, figure.removesuffix("_bytes"), *shown, f"{new / old - 1:+.2%}", style="red" if bad else ""
            )
    return table, regressions


def main(
    accept: Annotated[bool, typer.Option(help="Make the latest figures the baseline; nothing is run.")] = False,
) -> None:
    """Run, or accept what was run last."""
    latest, baseline = HERE / "latest.json", HERE / "baseline.json"
    if accept:
        if not latest.is_file():
            raise typer.BadParameter("there are no latest figures: run `make bench` first")
        baseline.write_text(latest.read_text(encoding="utf-8"), encoding="utf-8")
        return
    figures = run()
    latest.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if not baseline.is_file():
        print(f"There is no baseline yet: accept {latest.name} with `make bench-accept`.")
        raise typer.Exit(1)
    old = json.loads(baseline.read_text(encoding="utf-8"))
    table, regressions = compare(figures, old)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for name in ("python", "versions"):
        if old[name] != figures[name]:
            print(f"The baseline was measured with {name} {old[name]}, this with {figures[name]}.")
    if regressions:
        print("Regression: " + "; ".join(regressions))
        raise typer.Exit(1)
    print("No regression.")


if __name__ == "__main__":
    typer.run(main)
