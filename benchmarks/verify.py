"""Quantizes the embedded model by recipes that the formats hold, exports it in every format, and verifies each.

The runs are cheap, for the way through the formats and not for accuracy. Exit code 1 where a format is not its run.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import rotoboa
from rotoboa.pipeline.exporting import export
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe
from rotoboa.pipeline.verifying import verify

CHEAP: dict[str, Any] = {
    "model": "tiny",
    "weights.method": "gptq",
    "weights.grid": "minmax",
    "weights.refine": 0,
    "weights.starts": 1,
    "weights.tabu": 0,
    "calibration.samples": 4,
    "calibration.sequence_length": 64,
    "evaluation.windows": 4,
    "evaluation.baseline": False,
}
SYMMETRIC: dict[str, Any] = {"weights.symmetric": True}
ACTIVE = {**SYMMETRIC, "activations.search": False}

# Run: recipe, changes, formats.
RUNS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "w4a4kv4": ("w4a4kv4", {}, ("native",)),
    "w2a16, groups of 16": ("w2a16", {"weights.group_size": 16}, ("native", "compressed-tensors", "gptq")),
    "w3a16": ("w3a16", {}, ("compressed-tensors",)),
    "w4a16": ("w4a16", {}, ("compressed-tensors", "gptq")),
    "w4a16, symmetric": ("w4a16", SYMMETRIC, ("native", "compressed-tensors", "gptq", "gptq-v1", "gguf")),
    "w8a16, symmetric": ("w4a16", {**SYMMETRIC, "weights.bits": 8}, ("compressed-tensors", "gptq-v1", "gguf")),
    "w4a8": ("w4a16", {**ACTIVE, "activations.bits": 8, "activations.clip": 254 / 255}, ("compressed-tensors",)),
    "w8a8": ("w8a8", {}, ("native", "compressed-tensors")),
}


def main() -> int:
    """Print the table; 1 where a difference is above its tolerance."""
    logging.disable(logging.WARNING)
    table = Table("run", "format", "reader", "MiB", "largest difference", "std of logits", "same top token", "")
    failed = False
    with tempfile.TemporaryDirectory() as name:
        for index, (run, (recipe, changes, formats)) in enumerate(RUNS.items()):
            folder = Path(name) / str(index)
            rotoboa.quantize(build_recipe(load_recipe(recipe), {**CHEAP, **changes, "output": folder}))
            for format_name in formats:
                target = export(folder, format_name)
                size = sum(file.stat().st_size for file in (*target.glob("*.safetensors"), *target.glob("*.gguf")))
                for result in verify(target):
                    failed |= not result.passed
                    word = "shown" if result.tolerance is None else "ok" if result.passed else "TOO LARGE"
                    figures = (f"{result.difference:.3g}", f"{result.deviation:.3g}", f"{result.agreement:.1%}", word)
                    table.add_row(run, format_name, result.reader, f"{size / 2**20:.2f}", *figures)
    console = Console()
    if not console.is_terminal:
        console.width = 1000
    console.print(table)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
