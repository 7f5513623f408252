"""Runs of the embedded model for benchmarks: a recipe and changes to it, measured in a temporary folder."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rotoboa
from rotoboa.pipeline.recipe_files import build_recipe, load_recipe

HERE = Path(__file__).resolve().parent

PLAIN: dict[str, Any] = {
    "weights.method": "gptq",
    "weights.grid": "hessian",
    "weights.alpha": 0.0,
    "weights.drift": False,
    "weights.token_weights": False,
    "weights.refine": 0,
    "weights.starts": 1,
    "weights.tabu": 0,
    "weights.head": 0.0,
    "weights.act_order": False,
    "activations.search": False,
    "cache.search": False,
}
"""GPTQ as published: no residual compensation, no refinement, columns in their order."""


def measure(recipe: str, changes: Mapping[str, Any] | None = None, *, device: str | None = None) -> dict[str, Any]:
    """The report of one run of `recipe` on the embedded model with some fields changed."""
    with tempfile.TemporaryDirectory() as folder:
        off = dict.fromkeys(("evaluation.baseline", "evaluation.references", "evaluation.report"), False)
        overrides = {"model": "tiny", "output": folder + "/run", **off, **(changes or {})}
        return rotoboa.quantize(build_recipe(load_recipe(recipe), overrides), device=device)


def perplexity(report: Mapping[str, Any], which: str = "quantized") -> float:
    """The perplexity of a report on its only dataset."""
    (measured,) = report["perplexity"].values()
    return float(measured[which])


def ratio(report: Mapping[str, Any]) -> float:
    """Seconds of quantization over those of one plain forward pass over the calibration set, in the same run."""
    return float(report["seconds"]["quantize"] / report["plain_forward_seconds"])
