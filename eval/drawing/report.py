"""The report of a run: one self-contained HTML page, without a script, a font or a picture from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import yaml

from . import budget, costs, figures, source_figures
from .figures import Layer, Picture

if TYPE_CHECKING:
    from ...pipeline.storage.run_report import Report, ShownRotation


@dataclass(frozen=True)
class Contents:
    """All that a page shows.

    Attributes:
        report: what the run came to.
        rows: runs to compare as `pipeline.measure.comparing.comparison` has them, the page's own first.
        columns: the same as a table to read: titles, and a cell for each row.
        layers: losses of each projection of each block; empty where there are none.
        block_seconds: how long each block took, by its index.
        storage: bytes by part of the model and kind.
        activations: arrays by flat names, as `rotation.outliers.Outliers.tensors` has them; empty where there are none.
        datasets: what to call each data set.
    """

    report: Report
    rows: Sequence[Mapping[str, Any]]
    columns: Sequence[tuple[str, Sequence[str]]]
    layers: Sequence[Layer]
    block_seconds: Sequence[tuple[int, float]]
    storage: Mapping[str, Mapping[str, int]]
    activations: Mapping[str, np.ndarray]
    datasets: Mapping[str, str]


@dataclass(frozen=True)
class Section:
    """A part of the page; `wide` lets its first picture take the whole width."""

    title: str
    paragraphs: Sequence[str]
    pictures: Sequence[Picture]
    wide: bool = False


def page(contents: Contents) -> str:
    """The page as HTML text."""
    template = resources.files("rotoboa.eval.drawing").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    parts = (_runs, _activations, _budget, _losses, _sources, _costs)
    sections = [part(contents) for part in parts]
    report, others = contents.report, len(contents.rows) - 1
    words = (
        f"This run beside {others} other{'s' if others > 1 else ''}." if others else "What was measured of this run."
    )
    if report.bos:
        words += " Every window of text, in calibration and evaluation, begins with the tokenizer's BOS."
    listed = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return environment.from_string(template).render(
        name=contents.rows[0]["run"],
        summary=_summary(contents.rows[0], report),
        tiles=_tiles(contents),
        runs_text=words,
        columns=contents.columns,
        sections=[section for section in sections if section.pictures],
        made=f"On {report.device}, with Python {report.python}, {listed}.",
        recipe=yaml.safe_dump({k: v for k, v in report.recipe.items() if k != "output"}, sort_keys=False),
    )


def _summary(row: Mapping[str, Any], report: Report) -> str:
    bits, recipe = row["bits"], report.shown
    widths = {
        "weights": bits["weights"],
        "activations": bits["activations"],
        "keys": bits["keys"],
        "values": bits["values"],
    }
    way = f" by token in groups of {row['activation_group']}" if row["activation_group"] else ""
    if (kept := recipe.activations.directions) and bits["activations"] < 8:
        way += f" beside {kept} directions in 8"
    ways = {"activations": way}
    low = ", ".join(f"{name} in {width} bits{ways.get(name, '')}" for name, width in widths.items() if width < 16)
    if report.budget is not None and report.budget.units:
        low = low.replace(f"weights in {bits['weights']} bits", f"weights in {budget.range_of(report.budget)}", 1)
    sink, rotation = recipe.cache.sink, recipe.rotation
    if recipe.cache.served_by != "rotoboa" and min(bits["keys"], bits["values"]) < 16:
        low += f", as the cache of {recipe.cache.served_by} has them"
        rotation = rotation.model_copy(update={"r3": False})  # it turns them itself
    elif sink and min(bits["keys"], bits["values"]) < 16:
        low += f", but for the first {sink} positions" if sink > 1 else ", but for the first position"
    turned = _turned(rotation)
    return f"{row['model']}: {low}; {turned}; rounded by {row['method']}."


def _turned(rotation: ShownRotation) -> str:
    """The rotations of a recipe in words; of older runs r1 is true or false."""
    places = {"online": ["R1 behind the norms"], "none": [], False: [], "auto": ["R1 where it helps"]}
    names = [*places.get(rotation.r1, ["R1"])]
    names += [name.upper() for name in ("r2", "r3", "r4") if getattr(rotation, name)]
    names += ["heads"] if rotation.heads else []
    turned = f"rotated by {', '.join(names)}" if names else "not rotated"
    turned += f" in blocks of {rotation.blocks}" if names and rotation.blocks else ""
    return f"channels balanced, {turned}" if rotation.scale else turned


def _tiles(contents: Contents) -> list[tuple[str, str, str]]:
    """Label, value and remark of what is read first."""
    row, tiles = contents.rows[0], []
    for dataset, measured in row["perplexity"].items():
        full, ours = measured.get("full_precision"), measured.get("quantized")
        if ours is not None:
            note = f"{full:,.3f} in full precision" if full is not None else ""
            tiles.append((f"perplexity, {contents.datasets[dataset]}", f"{ours:,.3f}", note))
    for dataset, found in row["divergence"].items():
        if found["kl"] is not None:
            agree = f"same first choice {found['top1']:.1%}" if found["top1"] is not None else ""
            tiles.append((f"KL divergence, {contents.datasets.get(dataset, dataset)}", f"{found['kl']:.4f}", agree))
    own = {title: cells[0] for title, cells in contents.columns}
    scale = "scales and zero points included"
    if own.get("bits per weight"):
        tiles.append(("bits per weight", own["bits per weight"], scale))
    tiles.append(("size", own.get("size", ""), f"{own.get('original size', '')} before"))
    tiles.append(("quantization", own.get("quantization", ""), f"{own.get('whole run', '')} in all"))
    tiles.append(("peak memory", own.get("GPU memory") or own.get("memory", ""), ""))
    return [tile for tile in tiles if tile[1]]


def _runs(contents: Contents) -> Section:
    # A run with a note that makes its accuracy another has no place in the chart.
    same = [row for row in contents.rows if not [note for note in row["notes"] if note != "other device"]]
    pictures = []
    for dataset in contents.rows[0]["perplexity"]:
        picture = costs.bits_and_perplexity(same, dataset, contents.datasets[dataset])
        if picture is not None:
            pictures.append(picture)
    tasks = contents.rows[0]["tasks"]
    if tasks:
        pictures.append(costs.scores(tasks))
    return Section("Accuracy", [], pictures)


def _activations(contents: Contents) -> Section:
    found = contents.activations
    if not found:
        return Section("Activations", [], [])
    block = figures.pictured_block(found)
    # At the input of down stand the largest values, and at the others those of the residual stream's channels.
    surface = figures.surfaces(found, figures.pictured_site(found, block), block)
    words = [
        "What the rotation does to the inputs of the linear layers, on a few calibration sequences in full precision. "
        "The rotated model computes the same function.",
        "Before: the checkpoint as it is. After: norms folded, and every rotation of the recipe in place. The output "
        "projection's input is rotated within each head alone, so its heads keep their own sizes.",
    ]
    pictures = [
        surface,
        figures.spikiness(found, "kurtosis"),
        figures.spikiness(found, "peak"),
        *figures.pictures(found, block),
    ]
    return Section("Activations before and after rotation", words, pictures, wide=True)


def _budget(contents: Contents) -> Section:
    found = contents.report.budget
    if found is None or not found.units:
        return Section("Budget", [], [])
    pictures = [budget.bits_by_block(found, len(contents.block_seconds)), budget.dearest_units(found)]
    return Section("What the budget was spent on", [budget.sentence(found)], pictures)


def _losses(contents: Contents) -> Section:
    if not contents.layers:
        return Section("Losses", [], [])
    words = ["The objective of the rounding, tr(H_out E H_in E^T), relative to that of a zero weight: lower is better."]
    if any(len(layer.losses) > 1 for layer in contents.layers):
        words.append(
            "E is the distance from the target: the weight that, on the quantized inputs, gives the outputs of full "
            "precision. RTN and plain GPTQ (no residual, no refinement) round the same weights and are measured on the "
            "same statistics; both have one grid per row or group from its smallest to its largest weight."
        )
    pictures = [figures.losses_by_projection(contents.layers), figures.losses_by_block(contents.layers)]
    return Section("Loss of each layer", words, pictures)


def _sources(contents: Contents) -> Section:
    found = contents.report.sources
    if not found:
        return Section("Sources", [], [])
    words = [
        "What each quantizer costs alone: weights, the inputs of each kind of layer, keys, values. They do not add up."
    ]
    pictures = [source_figures.kl_by_source({"this run": found}), source_figures.errors_by_block(found)]
    return Section("Where the loss comes from", words, pictures)


def _costs(contents: Contents) -> Section:
    pictures = []
    if contents.storage:
        pictures.append(costs.storage(contents.storage, contents.rows[0]["sizes"].get("original", 0)))
    if contents.rows[0]["seconds"]:
        pictures.append(costs.seconds(contents.rows[0]["seconds"], contents.block_seconds))
    return Section("Bits and seconds", [], pictures)
