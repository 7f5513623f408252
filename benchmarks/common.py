"""Runs for benchmarks: a recipe and changes to it, measured in a temporary folder, one case after another."""

from __future__ import annotations

import hashlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import rotoboa
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe

HERE = Path(__file__).resolve().parent

PLAIN: dict[str, Any] = {
    "weights.method": "gptq",
    "weights.grid": "hessian",
    "weights.damping": 0.01,
    "weights.alpha": 0.0,
    "weights.drift": False,
    "weights.refine": 0,
    "weights.starts": 1,
    "weights.tabu": 0,
    "weights.head": 0.0,
    "weights.act_order": False,
    "activations.symmetric": True,
    "activations.search": False,
    "activations.directions": 0,
    "cache.search": False,
    "cache.center": False,
    "cache.sink": 0,
}
"""GPTQ as published: no residual compensation, no refinement, columns in their order."""
UNROTATED = {"rotation.r1": "none", "rotation.r2": False, "rotation.r3": False, "rotation.r4": False}
TRANSFORMS: dict[str, dict[str, Any]] = {"none": UNROTATED, "rotation": {}}
TURNED = {"rotation.r1": "online", "rotation.r2": True, "rotation.r4": True, "rotation.heads": False}
QUAROT = {
    "rotation.r1": "merged",
    "rotation.scale": False,
    "rotation.heads": False,
    "activations.directions": 0,
}
PLACEMENTS: dict[str, dict[str, Any]] = {
    **TRANSFORMS,
    "quarot": QUAROT,
    "quarot-64": {**QUAROT, "activations.directions": 64},
    "bare": {**UNROTATED, "rotation.heads": False, "rotation.blocks": None},
    **{f"blocks-{n}" if n else "full": {**TURNED, "rotation.blocks": n} for n in (None, 16, 32, 64, 128)},
}
"""With R1 where QuaRot has it too, merged into the residual stream, and without what this project adds to it; beside
64 leading directions of inputs; with no rotation at all; with those that formats in groups can have, over all channels
and in blocks. The directions are the nearest to QUAD (arXiv 2503.19353) and ResQ (2412.14363) that there is: theirs
are channels of their own, with weights of more bits too. DuQuant (2406.01721) fits its blocks to outliers, and permutes
channels between two such rotations; `blocks-128` is none of its settings."""
OFF: dict[str, Any] = dict.fromkeys(("evaluation.baseline", "evaluation.references", "evaluation.report"), False)
"""What is left out of a run that is measured for one figure."""
QUICK: dict[str, Any] = {
    "calibration.samples": 8,
    "calibration.sequence_length": 1024,
    "evaluation.windows": 8,
    "evaluation.split": "validation",
}
"""To choose by on a real model, in minutes a run; of data sets with splits the one that is not reported."""
STYLE = (
    "<style>:root{--ink:#1b2027;--faint:#b9c0c9;--series-0:#0b6bb5;--series-1:#c2500a;--series-2:#6b7280;"
    "--series-3:#00805f;--series-4:#9a4d8e;--series-5:#8a6d00}"
    "@media (prefers-color-scheme:dark){:root{--ink:#e8eaed;--faint:#59616b;--series-0:#5fb4f0;--series-1:#f0975a;"
    "--series-2:#a3abb6;--series-3:#43c79d;--series-4:#d79acb;--series-5:#d9bb4a}}</style>"
)
"""A picture by itself has no page to take its colours from: those of the report."""


def measure(recipe: str, changes: Mapping[str, Any] | None = None, *, device: str | None = None) -> dict[str, Any]:
    """The report of one run of `recipe` on the embedded model with some fields changed."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = {"model": "tiny", "output": folder + "/run", **OFF, **(changes or {})}
        return rotoboa.quantize(build_recipe(load_recipe(recipe), overrides), device=device)


def perplexity(report: Mapping[str, Any], which: str = "quantized") -> float:
    """The perplexity of a report on its only dataset."""
    (measured,) = report["perplexity"].values()
    return float(measured[which])


def ratio(report: Mapping[str, Any]) -> float:
    """Seconds of quantization over those of one plain forward pass over the calibration set, in the same run."""
    return float(report["seconds"]["quantize"] / report["plain_forward_seconds"])


def side_by_side(
    function: Callable[..., Any], cases: Mapping[str, tuple[Any, ...]], jobs: int, *, alone: bool = True
) -> Iterator[tuple[str, Any, str]]:
    """What `function` gives for the arguments of each case, as it is done: its key, the result, and how far all is.

    Args:
        function: a function of a module.
        cases: its arguments, by key.
        jobs: how many run at a time.
        alone: each in a process of its own, so that its peak of memory is not that of an earlier one.
    """
    started, run = time.monotonic(), partial(_alone, function) if alone else function
    with ThreadPoolExecutor(jobs) if alone else ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(run, *arguments): key for key, arguments in cases.items()}
        for number, future in enumerate(as_completed(waiting), 1):
            left = (time.monotonic() - started) / number * (len(cases) - number)
            yield waiting[future], future.result(), f"{number} of {len(cases)}, {left / 60:.0f} min left: "


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` gives in a new process. (A pool whose processes take one task starts one more in the end.)"""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def fingerprint(settings: Recipe, *more: str) -> str:
    """Of all that a recipe sets but the names of model, output and texts; `more` says what those hold."""
    names: Any = {"model": True, "output": True, "calibration": {"dataset"}, "evaluation": {"dataset"}}
    fields = settings.model_dump_json(exclude=names)
    return hashlib.sha256("\n".join([fields, *more]).encode()).hexdigest()[:16]


def content(name: str) -> str:
    """What a text or model is, wherever it lies: a checksum of a file, or of a folder's config and sizes, or a name."""
    path = Path(name)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    if not path.is_dir():
        return name
    sizes = [f"{file.name} {file.stat().st_size}" for file in sorted(path.glob("*.safetensors"))]
    config = path / "config.json"
    return hashlib.sha256("\n".join([config.read_text() if config.is_file() else "", *sizes]).encode()).hexdigest()[:16]


def shown(name: str) -> str:
    """A text or model in a document: of a path the last part alone, which says nothing of the machine."""
    return Path(name).resolve().name if Path(name).exists() else name


def command_of(target: str, model: str, text: str | None, calibrate: str | None) -> str:
    """What a person types for a benchmark's files."""
    given = {"MODEL": model if model != "tiny" else None, "TEXT": text, "CALIBRATE": calibrate}
    return " ".join([f"make {target}", *(f"{key}={shown(name)}" for key, name in given.items() if name)])


def file_name(kind: str, model: str) -> str:
    """The name, without its end, of the files of a benchmark on `model`, a folder or hub name."""
    return f"{kind}-{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(model).name)}"


def standalone(drawing: str, width: int = 720) -> str:
    """A chart's drawing as a document of its own."""
    head, rest = drawing.split(">", 1)
    return f'{head} width="{width}">{STYLE}{rest}\n'
