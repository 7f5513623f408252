"""The methods of the field as recipes of one program: (transform x objective x solver), on the embedded model.

    python benchmarks/methods.py      writes methods.md and methods.svg beside this file

Each method is set as its paper has it, without what this project adds to it, with and without a rotation. Every case is
a process of its own, so that its memory is its own too. Finished cases are kept in methods.json: an interrupted run
goes on, and `--fresh` measures all again.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from common import HERE, PLACEMENTS, PLAIN, TRANSFORMS, UNROTATED, measure, perplexity, side_by_side, standalone

from rotoboa.eval.drawing.charts import Chart, legend, log_scale, span

RECIPES = ("w2a16", "w4a4kv4")
PUBLISHED: dict[str, Any] = {
    **PLAIN,
    "weights.method": "boa",
    "weights.rows": 1,
    "weights.attention": "bound",
    "weights.value_rows": 0,
}
"""BoA as published; `PLAIN` is GPTQ so."""
SETTING: dict[str, Any] = {"calibration.samples": 64}
"""Half of a recipe's calibration sequences: all of it takes about an hour."""


@dataclass(frozen=True)
class Method:
    """One method of the field.

    Attributes:
        objective: in words.
        solver: in words.
        source: arXiv number.
        changes: what differs from a recipe of the package, by field.
    """

    objective: str
    solver: str
    source: str
    changes: dict[str, Any]


METHODS = {
    "RTN": Method("none", "to the nearest", "", {**PLAIN, "weights.method": "rtn", "weights.grid": "minmax"}),
    "GPTQ": Method("layer", "error compensation in a row", "2210.17323", PLAIN),
    "BoA": Method("attention", "error compensation, a row of a head at a time", "2406.13474", PUBLISHED),
    "TurboBoA": Method(
        "attention, inputs of earlier layers' errors",
        "error compensation, 16 rows at a time; coordinate descent",
        "2602.04929",
        {**PUBLISHED, "weights.rows": 16, "weights.alpha": 0.25, "weights.refine": 1},
    ),
    "AdaRound": Method("layer", "learned rounding", "2004.10568", {**PLAIN, "weights.method": "adaround"}),
    "BRECQ": Method(
        "output of the block",
        "learned rounding, backpropagation",
        "2102.05426",
        {**PUBLISHED, "weights.method": "brecq", "weights.iterations": 500},
    ),
    "aespa": Method(
        "attention, values without W_O",
        "learned rounding",
        "2402.08958",
        {**PUBLISHED, "weights.method": "aespa", "weights.value_output": False},
    ),
    "default": Method(
        "attention, inputs of earlier layers' errors",
        "error compensation, 4 rows at a time; coordinate descent, several starts, tabu search",
        "",
        {},
    ),
}


class Case(NamedTuple):
    """One cell: a recipe of the package and what is changed in it."""

    recipe: str
    method: str
    transform: str
    seed: int

    @property
    def changes(self) -> dict[str, Any]:
        """By field of the recipe."""
        method, transform = METHODS[self.method].changes, PLACEMENTS[self.transform]
        return {**method, **transform, "calibration.seed": self.seed}

    @property
    def key(self) -> str:
        """Its name in the file of results."""
        return " | ".join(map(str, self))


def cases(recipes: tuple[str, ...], seeds: int) -> list[Case]:
    """All of them, the quickest methods first."""
    return [
        Case(recipe, method, transform, seed)
        for seed in range(seeds)
        for method in METHODS
        for recipe in recipes
        for transform in TRANSFORMS
    ]


def run(case: Case, threads: int, extra: dict[str, Any]) -> dict[str, Any]:
    """Measure one case in this process; on one thread seconds are the processor's, whatever else runs; 0: on all.

    `sources` is there where `extra` asks for it.
    """
    if threads == 1:
        time.perf_counter = time.process_time
    torch.set_num_threads(threads or os.cpu_count() or 1)
    report = measure(case.recipe, {**SETTING, **case.changes, **extra})
    (divergence,) = report["divergence"].values()
    return {
        "perplexity": perplexity(report),
        "full_precision": perplexity(report, "full_precision"),
        "kl": divergence["kl"],
        "seconds": report["seconds"]["quantize"],
        "memory": report["peak_memory_bytes"]["host"],
        "size": report["sizes"]["quantized"],
        **{name: report[name] for name in ("sources",) if report.get(name)},
    }


def mean(results: dict[str, dict[str, float]], recipe: str, method: str, transform: str) -> dict[str, float] | None:
    """The figures of a cell over the seeds that are measured; None where there are none."""
    prefix = f"{recipe} | {method} | {transform} | "
    found = [result for key, result in results.items() if key.startswith(prefix)]
    shared = [name for name in found[0] if all(name in r for r in found)] if found else []
    return {name: sum(r[name] for r in found) / len(found) for name in shared} or None


def table(recipe: str, results: dict[str, dict[str, float]]) -> list[str]:
    """Markdown of one recipe: a row for each method and transform."""
    lines = [
        f"## {recipe}",
        "",
        "| method | transform | objective | solver | perplexity | KL | seconds | memory, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        for transform in TRANSFORMS:
            if found := mean(results, recipe, name, transform):
                lines.append(
                    f"| {name} | {transform} | {method.objective} | {method.solver} | {found['perplexity']:.2f} "
                    f"| {found['kl']:.4f} | {found['seconds']:.0f} | {found['memory'] / 2**20:.0f} |"
                )
    return [*lines, ""]


def settings(names: Iterable[str] = tuple(METHODS)) -> list[str]:
    """Markdown: how each of these methods is set, as options of `rotoboa quantize`."""

    def option(field: str, value: Any) -> str:
        if isinstance(value, bool):
            return f"--{field}" if value else f"--no-{field}"
        return f"--{field} {value}"

    lines = ["## Settings", "", "| method | source | options beside the recipe's |", "|---|---|---|"]
    for name in names:
        method = METHODS[name]
        given = " ".join(option(field, value) for field, value in method.changes.items())
        source = f"arXiv {method.source}" if method.source else ""
        lines.append(f"| {name} | {source} | {f'`{given}`' if given else 'none'} |")
    return [*lines, f"| transform none | | `{' '.join(option(*item) for item in UNROTATED.items())}` |", ""]


def picture(results: dict[str, dict[str, float]], recipes: tuple[str, ...]) -> str:
    """What each method adds to the perplexity of full precision, with and without rotation, as an SVG document."""
    names = list(METHODS)
    with Chart(height=0.6 + 0.26 * len(names), rows=len(recipes)) as chart:
        for axes, recipe in zip(chart.axes, recipes, strict=True):
            cells = {key: [mean(results, recipe, name, key) for name in names] for key in TRANSFORMS}
            known = [cell for row in cells.values() for cell in row if cell]
            if not known:
                continue
            full = known[0]["full_precision"]
            low, high = span([cell["perplexity"] - full for cell in known])
            for i, (key, row) in enumerate(cells.items()):
                found = [(place, cell["perplexity"]) for place, cell in enumerate(row) if cell]
                titles = [f"{names[place]}, {key}: {value:.2f}" for place, value in found]
                label = "no rotation" if key == "none" else key
                at = [place + 0.3 * (i - 0.5) for place, _ in found]
                chart.line(axes, [value - full for _, value in found], at, label, i, titles, joined=False)
                for place, (_, value) in zip(at, found, strict=True):
                    axes.annotate(
                        f"{value:.2f}", (value - full, place), (5, 0), textcoords="offset points", va="center",
                        fontsize=6.5,
                    )  # fmt: skip
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis()
            log_scale(axes.xaxis, low, high * 1.2)
            axes.set_title(f"{recipe}: perplexity above that in full precision, {full:.2f}", loc="left")
        legend(chart, chart.axes[0])
    return standalone(chart.svg("Perplexity of the methods of the field on the embedded model"))


def summary(results: dict[str, dict[str, float]], recipes: tuple[str, ...] = RECIPES) -> str:
    """The table of docs/results.md: for each method perplexity by recipe and transform, the dearest of its cells."""
    columns = [(recipe, transform) for recipe in recipes for transform in TRANSFORMS]
    heads = [f"`{recipe}`, {'rotated' if transform == 'rotation' else 'not rotated'}" for recipe, transform in columns]
    lines = [
        f"| method | objective | solver | {' | '.join(heads)} | seconds | memory, MiB |",
        f"|---|---|---|{'---|' * (len(heads) + 2)}",
    ]
    for name, method in METHODS.items():
        cells = [mean(results, recipe, name, transform) for recipe, transform in columns]
        known = [cell for cell in cells if cell]
        if not known:
            continue
        seconds, memory = (max(cell[figure] for cell in known) for figure in ("seconds", "memory"))
        shown = " | ".join(f"{cell['perplexity']:.2f}" if cell else "" for cell in cells)
        lines.append(
            f"| {name} | {method.objective} | {method.solver} | {shown} | {seconds:.0f} | {memory / 2**20:.0f} |"
        )
    return "\n".join(lines)


def document(results: dict[str, dict[str, float]], recipes: tuple[str, ...], seeds: int) -> str:
    """methods.md."""
    lines = [
        "# The methods of the field, on the embedded model",
        "",
        "Made by `make methods`. Each method is a choice of transform, objective and solver in one program, set as its",
        "paper has it: without the shifted target of this project's default (the last rows), its several starts and",
        "its searches. TurboBoA is its setting (rows, target, descent), not its code; BRECQ learns for 500",
        f"steps, AdaRound and aespa for 2,000. {SETTING['calibration.samples']} calibration sequences, seeds: {seeds}.",
        "Perplexity and KL are on the text that is reported, by which nothing was chosen; seconds are those of",
        "quantization (of the processor, on one thread), memory is the peak of the process.",
        f"torch {version('torch')}, transformers {version('transformers')}, Python {platform.python_version()}, "
        f"{platform.machine()}.",
        "",
        "![perplexity by method](methods.svg)",
        "",
    ]
    for recipe in recipes:
        lines += table(recipe, results)
    return "\n".join([*lines, *settings()]).rstrip() + "\n"


def write(results: dict[str, dict[str, float]], recipes: tuple[str, ...], seeds: int, folder: Path, name: str) -> None:
    """The document and the picture."""
    (folder / f"{name}.md").write_text(document(results, recipes, seeds), encoding="utf-8")
    (folder / f"{name}.svg").write_text(picture(results, recipes), encoding="utf-8")


def main(
    seeds: Annotated[int, typer.Option(help="Calibration seeds, from 0 on.")] = 1,
    jobs: Annotated[int, typer.Option(help="Cases measured side by side: seconds are best with one.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads of a case; with one, seconds are the processor's.")] = 1,
    recipes: Annotated[str, typer.Option(help="Which recipes, separated by commas.")] = ",".join(RECIPES),
    methods: Annotated[str, typer.Option(help="Which methods are measured, separated by commas.")] = ",".join(METHODS),
    fresh: Annotated[bool, typer.Option(help="Measure every case again.")] = False,
) -> None:
    """Measure what is missing and write methods.md and methods.svg."""
    chosen, wanted = tuple(recipes.split(",")), methods.split(",")
    if unknown := [method for method in wanted if method not in METHODS]:
        raise typer.BadParameter(f"{', '.join(unknown)}: there are {', '.join(METHODS)}")
    kept = HERE / "methods.json"
    results: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() and not fresh else {}
    missing = {case.key: case for case in cases(chosen, seeds) if case.method in wanted and case.key not in results}
    for key, found, far in side_by_side(run, {key: (case, threads, {}) for key, case in missing.items()}, jobs):
        results[key] = found
        kept.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"{far}{key}: perplexity {found['perplexity']:.2f}, {found['seconds']:.0f} s", flush=True)
    if results:
        write(results, chosen, seeds, HERE, "methods")
        print("wrote methods.md and methods.svg")


if __name__ == "__main__":
    typer.run(main)
