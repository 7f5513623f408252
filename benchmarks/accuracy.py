"""The accuracy that the defaults reach on the embedded model, over calibration seeds.

    python benchmarks/accuracy.py

Portable form: the perplexity above full precision relative to plain GPTQ's (no residual, no refinement; rotated for
W4A4KV4 alone).
"""

from __future__ import annotations

import sys
from statistics import mean, stdev
from typing import Annotated, Any

import typer
from common import PLAIN, measure, perplexity
from rich.console import Console
from rich.table import Table

UNROTATED: dict[str, Any] = {"rotation.r1": "none", "rotation.r2": False}
GOALS = {"w2a16": (12.90, 0.45, UNROTATED), "w3a16": (12.27, 0.5, UNROTATED), "w4a4kv4": (13.15, 0.75, {})}


def main(seeds: Annotated[int, typer.Option(help="Calibration seeds, from 0 on.")] = 3) -> None:
    """Print defaults, plain GPTQ and the goals."""
    table = Table("recipe", "full precision", "plain GPTQ", "default", "spread", "goal", "portable", "goal ")
    for recipe, (goal, portable, changes) in GOALS.items():
        found, plain = [], []
        for seed in range(seeds):
            print(f"{recipe}, seed {seed} ...", file=sys.stderr, flush=True)
            report = measure(recipe, {"calibration.seed": seed})
            found.append(perplexity(report))
            plain.append(perplexity(measure(recipe, {**PLAIN, **changes, "calibration.seed": seed})))
        full = perplexity(report, "full_precision")
        relative = (mean(found) - full) / (mean(plain) - full)
        spread = f"{stdev(found):.3f}" if seeds > 1 else ""
        table.add_row(
            recipe, f"{full:.3f}", f"{mean(plain):.3f}", f"{mean(found):.3f}", spread, f"{goal:.2f}",
            f"{relative:.2f}", f"{portable:.2f}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    typer.run(main)
