"""Seconds of each stage of the quantizer on the embedded model, and how many plain forward passes they amount to.

    python benchmarks/speed.py                    W2A16, W3A16 and W4A4KV4, on one thread
    python benchmarks/speed.py --threads 2        with so many threads
    python benchmarks/speed.py --write            speed.json and speed.md, of this machine, and the factors of `inspect`

On one thread seconds are the processor's: whatever else runs on the machine does not count. With more of them they are
the clock's, and the machine should be quiet. A plain forward pass is one over the same calibration set, in the same
run. RTN and plain GPTQ for the report are not measured beside the method.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
RECIPES = ("w2a16", "w3a16", "w4a4kv4")


def measure(recipe: str, threads: int, changes: dict[str, str]) -> dict[str, Any]:
    """Seconds by stage and of a plain forward pass, in a process of its own: it changes what the clock is."""
    given = [f"{name}={value}" for name, value in changes.items()]
    command = [sys.executable, str(HERE / "speed.py"), "--threads", str(threads), "--only", recipe]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    arguments = [item for value in given for item in ("--change", value)]
    done = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(recipe: str, threads: int, changes: dict[str, str]) -> dict[str, Any]:
    """The same, in this process."""
    if threads == 1:
        time.perf_counter = time.process_time
    import torch
    from common import measure as report_of
    from common import ratio

    from rotoboa.pipeline.estimate.machines import measured

    torch.set_num_threads(threads)
    report = report_of(recipe, changes)
    rates = measured(torch.device("cpu"), time.perf_counter)
    return {
        "rates": rates.rates,
        "stages": report["stages"],
        "quantize": report["seconds"]["quantize"],
        "total": report["seconds"]["total"],
        "plain forward pass": report["plain_forward_seconds"],
        "evaluation": sum(s for name, s in report["seconds"].items() if name.startswith("evaluate")),
        "ratio": ratio(report),
        "peak_memory_bytes": report["peak_memory_bytes"]["host"],
        "calibration": report["tokens"]["calibration"],
    }


def machine(threads: int) -> dict[str, Any]:
    """What the figures are of."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "processor": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "clock": "processor time" if threads == 1 else "wall clock",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(figures: dict[str, Any]) -> Table:
    """Seconds, and in parts of a plain forward pass, by stage and recipe."""
    from rotoboa.boa.stopwatch import STAGES

    results = figures["results"]
    found = Table("stage", *(f"{recipe} {unit}" for recipe in results for unit in ("s", "passes")))
    names = [name for name in STAGES if any(result["stages"].get(name) for result in results.values())]
    for name in names:
        found.add_row(name, *_cells(results, lambda r, name=name: r["stages"].get(name, 0.0)))
    found.add_section()
    rest = _cells(results, lambda r: r["quantize"] - sum(r["stages"].values()))
    found.add_row("embedding, packing, writing, head", *rest)
    found.add_row("quantization", *_cells(results, lambda r: r["quantize"]))
    found.add_row("plain forward pass", *_cells(results, lambda r: r["plain forward pass"]))
    return found


def _cells(results: dict[str, Any], of: Any) -> list[str]:
    return [f"{value:.2f}" for r in results.values() for value in (of(r), of(r) / r["plain forward pass"])]


def markdown(figures: dict[str, Any]) -> str:
    """The same as a page."""
    shown = table(figures)
    rows = [[str(cell) for cell in column.cells] for column in shown.columns]
    lines = [
        [str(column.header) for column in shown.columns],
        ["---"] + ["---:"] * (len(rows) - 1),
        *zip(*rows, strict=True),
    ]
    m = figures["machine"]
    samples, length = next(iter(figures["results"].values()))["calibration"]
    threads = f"{m['threads']} thread{'s' * (m['threads'] > 1)}"
    head = [
        "# Speed of the quantizer",
        "",
        f"Made by `make speed ARGS=--write`: the embedded model, {samples} calibration sequences of {length} tokens.",
        f"{m['processor']} ({m['capability']}), {threads}, {m['clock']}; Python {m['python']}, torch {m['torch']}.",
        "A pass is one plain forward pass over the calibration set in the same run.",
        "",
    ]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines), ""])


def factors(figures: dict[str, Any]) -> dict[str, float]:
    """How many times as long as its counts each stage of an estimate took: the median over recipes."""
    from common import OFF
    from transformers import AutoConfig

    from rotoboa.models.aliases import resolve_model
    from rotoboa.models.decoder import Decoder
    from rotoboa.pipeline.estimate.counting import ROUNDING, whole
    from rotoboa.pipeline.estimate.machines import Machine
    from rotoboa.pipeline.estimate.workload import Plan, Sizes
    from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe

    model = resolve_model("tiny")
    sizes = Sizes.of(Decoder(AutoConfig.from_pretrained(model.source)))
    found: dict[str, list[float]] = {}
    for name, result in figures["results"].items():
        samples, length = result["calibration"]
        recipe = build_recipe(load_recipe(name), {**OFF, **figures["changes"], "calibration.samples": samples})
        stages: dict[str, float] = result["stages"]
        taken = {stage: seconds for stage, seconds in stages.items() if stage not in ROUNDING}
        taken |= {stage: result[stage] for stage in ("plain forward pass", "evaluation")}
        taken["rounding"] = sum(stages.get(stage, 0.0) for stage in ROUNDING)
        taken["rotation, packing, head"] = result["quantize"] - sum(stages.values()) + stages["rotation"]
        machine, windows = Machine("", **result["rates"]), recipe.evaluation.windows or model.windows
        for stage, work in whole(sizes, Plan.of(recipe, length, windows)).items():
            if taken.get(stage):
                found.setdefault(stage, []).append(taken[stage] / machine.seconds(work))
    return {stage: round(median(values), 2) for stage, values in found.items()}


def main(
    threads: Annotated[int, typer.Option(min=0, help="Of torch; 0 for all.")] = 1,
    recipe: Annotated[list[str] | None, typer.Option(help="A recipe; may be repeated. (default three)")] = None,
    change: Annotated[list[str] | None, typer.Option(help="FIELD=VALUE of the recipe, to try something.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write speed.json, speed.md and factors.json.")] = False,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print seconds by stage."""
    if [item for item in change or [] if "=" not in item]:
        raise typer.BadParameter("--change takes FIELD=VALUE")
    changes = dict(item.split("=", 1) for item in change or [])
    threads = threads or os.cpu_count() or 1
    if only is not None:
        print(json.dumps(run(only, threads, changes)))
        return
    results = {}
    for name in recipe or RECIPES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = measure(name, threads, changes)
    figures = {"machine": machine(threads), "changes": changes, "results": results}
    Console(width=None if sys.stdout.isatty() else 140).print(table(figures))
    if write:
        (HERE / "speed.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        (HERE / "speed.md").write_text(markdown(figures), encoding="utf-8")
        target = HERE.parent / "pipeline" / "estimate" / "factors.json"
        target.write_text(json.dumps(factors(figures), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
