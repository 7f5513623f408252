"""The page and the picture of the judge (`real.py`), and what it judges."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

from common import PLACEMENTS, QUICK, command_of, content, fingerprint, shown, standalone
from methods import METHODS, Case, mean, settings

from rotoboa.eval.drawing.charts import Chart, legend, log_scale, span
from rotoboa.eval.drawing.source_figures import kl_by_source
from rotoboa.eval.drawing.source_tables import BY_BLOCK, markdown, markdown_by_block, measured_on
from rotoboa.eval.results import Sources
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe

Results = dict[str, dict[str, float]]
"""Figures by the key of a case."""
GROUPED = ("weights.group_size", "activations.group_size")
GROUPS = ("w4a16", "w3a16", "w2a16")
DEFAULT: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("w4a16", "w3a16", "w2a16", "w4a8", "w4a4", "w4a4kv4")},
    "w4a4kv4-g64": ("w4a4kv4", {"activations.group_size": 64}),
    **{f"{name}-g64": (name, {"weights.group_size": 64}) for name in GROUPS},
}
"""By what a table calls them, the recipe of the package and what is changed in it: those that are measured unasked."""
ENDS = {"embedding.bits": 8, "head.bits": 8}
BUDGETS: dict[str, tuple[str, dict[str, Any]]] = {
    f"budget-{bits}": ("w3a16", {"weights.budget": bits}) for bits in (2.5, 3.0, 3.5)
}
"""Bits that differ by layer, so many a weight on average."""
BY_SIZE: dict[str, tuple[str, dict[str, Any]]] = {**{name: DEFAULT[name] for name in GROUPS}, **BUDGETS}
"""What a curve of KL by bytes is drawn of, each with 16-bit ends and with packed ones (`-e8`)."""
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    **DEFAULT,
    **BUDGETS,
    **{f"{name}-e8": (recipe, changes | ENDS) for name, (recipe, changes) in BY_SIZE.items()},
    **{name: (name, {}) for name in ("nvfp4", "mxfp4", "nvfp4a16", "mxfp4a16")},
    **{f"w4a4-g{size}": ("w4a4", dict.fromkeys(GROUPED, size)) for size in (16, 32, 64, 128)},
    **{f"w4a16-g{size}": ("w4a16", {GROUPED[0]: size}) for size in (16, 32, 128)},
}
"""All that can be asked for: floating point too, beside integers in groups of the same sizes."""


@dataclass(frozen=True)
class Subject:
    """What is judged.

    Attributes:
        model: a folder or hub name.
        text: what perplexity and KL are of.
        calibrate: what is calibrated on.
        setting: what all cases have alike, by field.
    """

    model: str
    text: str
    calibrate: str
    setting: dict[str, Any]

    def changes(self, case: Case) -> dict[str, Any]:
        """By field of the recipe, beside those of the method.

        The default of a packaged recipe says where its loss comes from too: as long again as the evaluation.
        """
        texts = {"calibration.dataset": self.calibrate, "evaluation.dataset": self.text}
        changed = RECIPES[case.recipe][1]
        sources = {"evaluation.sources": case.method == "default" and case.seed == 0 and not changed}
        return {"model": self.model, **texts, **sources, **changed, **self.setting}

    def prints(self, cases: Iterable[Case]) -> dict[str, str]:
        """The fingerprint of each case by its key.

        Raises:
            InputError: a setting is none of a recipe.
        """
        contents = [content(name) for name in (self.model, self.text, self.calibrate)]
        read = cache(load_recipe)  # which takes longer than all else here
        found = {}
        for case in cases:
            recipe = build_recipe(read(RECIPES[case.recipe][0]), {**case.changes, **self.changes(case)})
            found[case.key] = fingerprint(recipe, *contents)
        return found


def rows(results: Results) -> list[tuple[str, str, str]]:
    """Method, transform and what a table calls the two, of those that are measured."""
    kinds = {tuple(key.split(" | ")[1:3]) for key in results}
    single = len({transform for _, transform in kinds}) == 1
    return [
        (name, transform, name if single else f"{name}, {_turned(transform)}")
        for name in METHODS
        for transform in PLACEMENTS
        if (name, transform) in kinds
    ]


def _turned(transform: str) -> str:
    words = {
        "rotation": "rotated",
        "none": "not rotated",
        "quarot": "QuaRot's rotations",
        "quarot-64": "QuaRot's rotations, 64 directions in 8 bits",
        "bare": "no rotation",
    }
    return words.get(transform) or transform.replace("full", "all channels").replace("-", " of ")


def overview(results: Results) -> list[str]:
    """Markdown: KL, a row for each method and a column for each recipe."""
    recipes = [recipe for recipe in RECIPES if any(key.startswith(f"{recipe} | ") for key in results)]
    lines = [f"| KL | {' | '.join(recipes)} |", f"|---|{'---|' * len(recipes)}"]
    for name, transform, label in rows(results):
        cells = [mean(results, recipe, name, transform) for recipe in recipes]
        lines.append(f"| {label} | {' | '.join(_figure(cell['kl']) if cell else '' for cell in cells)} |")
    return [*lines, ""]


def table(recipe: str, results: Results) -> list[str]:
    """Markdown of one recipe: a row for each method."""
    lines = [
        f"## {recipe}",
        "",
        "| method | perplexity | KL | size, MiB | seconds | memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, transform, label in rows(results):
        if cell := mean(results, recipe, name, transform):
            size, memory = cell["size"] / 2**20, cell["memory"] / 2**20
            lines.append(
                f"| {label} | {cell['perplexity']:,.2f} | {_figure(cell['kl'])} | {size:,.1f} "
                f"| {cell['seconds']:,.0f} | {memory:,.0f} |"
            )
    return [*lines, ""] if len(lines) > 4 else []


def _figure(kl: float) -> str:
    return f"{kl:.4f}" if kl < 1 else f"{kl:.2f}"


def picture(results: Results, model: str) -> str:
    """KL by recipe, a mark for each method, with axes for each transform, as an SVG document."""
    recipes = [recipe for recipe in RECIPES if any(key.startswith(f"{recipe} | ") for key in results)]
    transforms = [name for name in PLACEMENTS if any(transform == name for _, transform, _ in rows(results))]
    low, high = span([found["kl"] for found in results.values()])
    with Chart(height=0.8 + 0.3 * len(recipes), rows=len(transforms)) as chart:
        for axes, transform in zip(chart.axes, transforms, strict=True):
            for series, name in enumerate(dict.fromkeys(method for method, _, _ in rows(results))):
                cells = [(place, mean(results, recipe, name, transform)) for place, recipe in enumerate(recipes)]
                found = [(place, cell["kl"]) for place, cell in cells if cell]
                titles = [f"{recipes[place]}, {name}: {kl:.4f}" for place, kl in found]
                at = [place for place, _ in found]
                chart.line(axes, [kl for _, kl in found], at, name, series, titles, joined=False)
            axes.set_yticks(range(len(recipes)), recipes)
            axes.set_ylim(len(recipes) - 0.5, -0.5)
            log_scale(axes.xaxis, low, high)
            axes.set_title(f"KL from full precision, {_turned(transform)}", loc="left")
        legend(chart, chart.axes[0], columns=3)
    return standalone(chart.svg(f"KL of the methods of the field on {shown(model)}"))


def sizes_picture(results: Results, model: str) -> str | None:
    """KL of the default by the size of the tensor files, as an SVG document; None where fewer than three can be had."""
    points = {}
    for end, ends in (("", ""), ("-e8", ", ends in 8 bits")):
        for label, names in (("one width", GROUPS), ("a budget", tuple(BUDGETS))):
            cells = {name + end: mean(results, name + end, "default", "rotation") for name in names}
            points[label + ends] = sorted((c["size"] / 2**20, c["kl"], name) for name, c in cells.items() if c)
    if sum(map(len, points.values())) < 3:
        return None
    with Chart(height=2.8) as chart:
        axes = chart.axes[0]
        for number, (label, found) in enumerate(points.items()):
            if found:
                sizes, kl, _ = zip(*found, strict=True)
                titles = [f"{name}: {k:.4f}, {size:.1f} MiB" for size, k, name in found]
                chart.line(axes, sizes, kl, label, number, titles)
        log_scale(axes.yaxis, *span([kl for found in points.values() for _, kl, _ in found]))
        axes.set_xlabel("MiB, embedding and head included")
        axes.set_title("KL from full precision by size", loc="left")
        legend(chart, axes, columns=2)
    return standalone(chart.svg(f"KL by size of the default on {shown(model)}"))


def sources_picture(sources: Mapping[str, Mapping[str, Any]], model: str) -> str:
    """Where the default's loss comes from, as an SVG document; `sources` by the key of a case."""
    return standalone(kl_by_source(_labelled(sources), f"KL with one quantizer on alone, {shown(model)}").svg)


def _labelled(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Sources]:
    keys = {key: key.split(" | ") for key in sources}
    return {
        recipe + ("" if transform == "rotation" else f", {_turned(transform)}"): Sources.model_validate(sources[key])
        for key, (recipe, _, transform, _) in keys.items()
    }


def source_lines(sources: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    """Markdown: KL of the default with one quantizer on alone, and by block."""
    if not sources:
        return []
    labelled = _labelled(sources)
    lines = [
        "## Where the default's loss comes from",
        "",
        "KL with one quantizer on alone, all else in full precision. ",
    ]
    lines[-1] += measured_on(next(iter(labelled.values())))
    lines += ["", *markdown(labelled, "recipe"), "", f"![KL by source]({name}-sources.svg)", "", BY_BLOCK, ""]
    for label, entry in labelled.items():
        if len(entry.kl) > 2:
            lines += [f"### {label}, by block", "", *markdown_by_block(entry), ""]
    return lines


def document(
    results: Results,
    subject: Subject,
    name: str,
    *,
    size: int,
    bos: bool,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The page.

    Args:
        size: bytes of the model's own tensor files.
        bos: whether windows begin with BOS.
        sources: where the loss of a case comes from, by its key.
    """
    setting, first = subject.setting, next(iter(results.values()))
    length, seeds = setting["calibration.sequence_length"], {key.rpartition(" | ")[2] for key in results}
    others = {key: value for key, value in setting.items() if key not in QUICK}
    arguments = " ARGS=--quick" if setting.items() >= QUICK.items() else ""
    lines = [
        f"# {shown(subject.model)}: the methods of the field",
        "",
        f"Made by `{command_of('real', subject.model, subject.text, subject.calibrate)}{arguments}`. Each method is",
        "set as its paper has it (below), beside this project's default. Calibrated on",
        f"{setting['calibration.samples']} sequences of {length:,} tokens of {shown(subject.calibrate)}, seeds: "
        f"{', '.join(sorted(seeds))}; measured on",
        f"{setting['evaluation.windows']} windows of {length:,} tokens of {shown(subject.text)}; windows begin "
        f"{'with' if bos else 'without'} BOS.",
        *(
            [f"Changed in every recipe: {', '.join(f'{key} {value}' for key, value in others.items())}."]
            if others
            else []
        ),
        f"Full precision: perplexity {first['full_precision']:,.3f}, {size / 2**20:,.1f} MiB. Sizes are those of the "
        "tensor files, embedding and head included;",
        "seconds those of quantization, memory the peak of the process.",
        f"torch {version('torch')}, transformers {version('transformers')}, Python {platform.python_version()}, "
        f"{platform.machine()}.",
        "",
        f"![KL by recipe and method]({name}.svg)",
        "",
        *overview(results),
        *([f"![KL by size]({name}-sizes.svg)", ""] if sizes_picture(results, subject.model) else []),
    ]
    for recipe in RECIPES:
        lines += table(recipe, results)
    changed = {label: given for label, (_, given) in RECIPES.items() if given and table(label, results)}
    for label, given in changed.items():
        lines += [f"`{label}` has {', '.join(f'`--{field} {value}`' for field, value in given.items())}.", ""]
    lines += source_lines(sources or {}, name)
    return "\n".join([*lines, *settings(dict.fromkeys(method for method, _, _ in rows(results)))]).rstrip() + "\n"
