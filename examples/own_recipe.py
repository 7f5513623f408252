"""W4A4 by a recipe of one's own, beside the same with plain GPTQ.

    python examples/own_recipe.py
    python examples/own_recipe.py --samples 8 --windows 8   # quicker

A recipe is checked as it is made: a field that is unknown or illegal is an InputError, in one sentence.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rotoboa


def main(model: str, text: str | None, output: Path, samples: int, windows: int) -> None:
    """Two runs that differ in how weights are rounded, and their figures."""
    recipe = {
        "model": model,
        "rotation": {"r1": "online", "r4": True, "heads": True, "scale": True},
        "weights": {"bits": 4, "group_size": 16, "alpha": 0.25, "drift": False},
        "activations": {"bits": 4, "symmetric": False, "group_size": 16},
        "calibration": {"dataset": text, "samples": samples},
        "evaluation": {"dataset": text, "windows": windows, "baseline": False, "report": False},
    }
    mine = rotoboa.Recipe(**recipe, output=output / "mine")
    reports = {
        "mine": rotoboa.quantize(mine),
        "plain GPTQ": rotoboa.quantize(
            mine,
            output=output / "gptq",
            weights={"method": "gptq", "alpha": 0.0, "refine": 0, "starts": 1, "tabu": 0},
        ),
    }
    for name, report in reports.items():
        for dataset, found in report["divergence"].items():
            perplexity = report["perplexity"][dataset]["quantized"]
            print(f"{name}, on {dataset}: perplexity {perplexity:.2f}, KL {found['kl']:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a short name, a hub id or a folder")
    parser.add_argument("--text", help="a text file or folder; by default the model's own text")
    parser.add_argument("--output", type=Path, default=Path("runs/example-recipe"), help="folder of the two runs")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--windows", type=int, default=200, help="windows of text that are measured")
    main(**vars(parser.parse_args()))
