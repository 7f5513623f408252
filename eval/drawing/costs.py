"""Costs and accuracy of a run's report, and other runs beside it, as the figures of `figures.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .charts import INK, Chart, legend, log_scale, span
from .figures import Picture

Row = Mapping[str, Any]

# -- costs ------------------------------------------------------------------------------------------------------------


def storage(parts: Mapping[str, Mapping[str, int]], original: int) -> Picture:
    """Bars: bytes of each part of the exported model, stacked by kind."""
    kinds = list(dict.fromkeys(kind for part in parts.values() for kind in part))
    total = sum(size for part in parts.values() for size in part.values())
    divisor, unit = _unit(max(sum(part.values()) for part in parts.values()), _BYTES)
    with Chart(height=0.7 + 0.24 * len(parts)) as chart:
        axes = chart.axes[0]
        left = [0.0] * len(parts)
        for i, kind in enumerate(kinds):
            sizes = [part.get(kind, 0) / divisor for part in parts.values()]
            titles = [f"{name}, {kind}: {size:.3g} {unit}" for name, size in zip(parts, sizes, strict=True)]
            chart.bars(axes, range(len(parts)), sizes, kind, i, titles, left=left)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        axes.set_yticks(range(len(parts)), list(parts))
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel(unit)
        legend(chart, axes, 2)
    title = "Where the bits went"
    rows = [[name, *(_bytes(part.get(kind, 0)) for kind in kinds)] for name, part in parts.items()]
    text = f"The model takes {_bytes(total)}; the original took {_bytes(original)}."
    return Picture(title, chart.svg(title), text, ["part", *kinds], rows)


def seconds(stages: Mapping[str, float], blocks: Sequence[tuple[int, float]]) -> Picture:
    """Bars: how long each stage of the run took."""
    rest = stages.get("total", 0.0) - sum(value for name, value in stages.items() if name != "total")
    shown = {name: value for name, value in stages.items() if name != "total"}
    if rest > 0.005 * stages.get("total", 0.0):
        shown["checks, plain forward pass"] = rest
    divisor, unit = _unit(max(shown.values(), default=1.0), _SECONDS)
    with Chart(height=0.6 + 0.24 * len(shown)) as chart:
        axes = chart.axes[0]
        lengths = [value / divisor for value in shown.values()]
        titles = [f"{name}: {value:.3g} {unit}" for name, value in zip(shown, lengths, strict=True)]
        chart.bars(axes, range(len(shown)), lengths, None, 0, titles)
        axes.set_yticks(range(len(shown)), list(shown))
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel(unit)
    title = "Where the seconds went"
    rows = [[name, f"{value:.1f}"] for name, value in shown.items()]
    rows += [[f"quantize, block {block}", f"{value:.1f}"] for block, value in blocks]
    slowest = max((value for _, value in blocks), default=0.0)
    text = f"The slowest of {len(blocks)} blocks took {slowest:.3g} seconds." if blocks else ""
    return Picture(title, chart.svg(title), text, ["stage", "seconds"], rows)


_BYTES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_SECONDS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))


def _unit(largest: float, units: Sequence[tuple[int, str]]) -> tuple[int, str]:
    return next((unit for unit in units if largest >= 2 * unit[0]), units[-1])


def _bytes(size: float) -> str:
    divisor, unit = _unit(size, _BYTES)
    return f"{size / divisor:.3g} {unit}"


# -- runs -------------------------------------------------------------------------------------------------------------


def bits_and_perplexity(rows: Sequence[Row], dataset: str, label: str) -> Picture | None:
    """A point for each run: bits of a stored weight, perplexity on one text; the first row is the run of the page."""
    points = [row for row in rows if row["perplexity"].get(dataset, {}).get("quantized") is not None]
    points = [row for row in points if math.isfinite(row["perplexity"][dataset]["quantized"])]
    if not points:
        return None
    kinds = list(dict.fromkeys(_kind(row) for row in points))
    full = points[0]["perplexity"][dataset].get("full_precision")
    with Chart(height=3.0) as chart:
        axes = chart.axes[0]
        values = [row["perplexity"][dataset]["quantized"] for row in points]
        for i, kind in enumerate(kinds):
            own = [row for row in points if _kind(row) == kind]
            titles = [
                f"{row['run']}: {_bits(row):.3g} bits, perplexity {row['perplexity'][dataset]['quantized']:.4g}"
                for row in own
            ]
            heights = [row["perplexity"][dataset]["quantized"] for row in own]
            chart.line(axes, [_bits(row) for row in own], heights, kind, i, titles, joined=False)
        if full:
            axes.axhline(full, color=INK, linewidth=0.8, linestyle=(0, (2, 2)), label="full precision")
        first = points[0]
        axes.scatter(
            [_bits(first)], [first["perplexity"][dataset]["quantized"]], s=110, facecolors="none", edgecolors=INK,
            linewidths=1.0, label="this run",
        )  # fmt: skip
        low, high = span([*values, *([full] if full else [])], 1.08)
        log_scale(axes.yaxis, low, high)
        bits = [_bits(row) for row in points]
        axes.set_xlim(min(bits) - 0.5, max(bits) + 0.5)
        axes.set_xlabel("bits per weight")
        axes.set_ylabel(f"perplexity on {label}")
        legend(chart, axes, 2)
    title = f"Bits and perplexity on {label}"
    table = [
        [row["run"], f"{_bits(row):.3g}", _kind(row), f"{row['perplexity'][dataset]['quantized']:.4f}"]
        for row in points
    ]
    one = "This is the only run with this model and text so far: `rotoboa report` with several runs compares them."
    text = f"{len(points)} runs of the same model on the same text." if len(points) > 1 else one
    return Picture(title, chart.svg(title), text, ["run", "bits per weight", "method", "perplexity"], table)


def _bits(row: Row) -> float:
    """As stored, scales included; of older runs, which do not say it, as the recipe has them."""
    return float(row["bits"]["per_weight"] or row["bits"]["weights"])


def _kind(row: Row) -> str:
    bits = row["bits"]
    cache = "" if min(bits["keys"], bits["values"]) == 16 else f"KV{min(bits['keys'], bits['values'])}"
    groups = f" in {row['activation_group']}s " if row["activation_group"] and bits["activations"] < 16 else ""
    return f"{row['method']} A{bits['activations']}{groups}{cache}".rstrip()


def scores(tasks: Mapping[str, Mapping[str, Any]]) -> Picture:
    """Bars: each task's score in full precision and quantized."""
    names = {"full_precision": "full precision", "quantized": "this run"}
    with Chart(height=0.7 + 0.36 * len(tasks)) as chart:
        axes = chart.axes[0]
        for i, (key, label) in enumerate(names.items()):
            values = [float(found.get(key) or 0) for found in tasks.values()]
            titles = [f"{task}, {label}: {value:.3f}" for task, value in zip(tasks, values, strict=True)]
            chart.bars(axes, [row + 0.4 * i - 0.2 for row in range(len(tasks))], values, label, 1 - i, titles, 0.36)
        errors = [float(found.get("stderr") or 0) for found in tasks.values()]
        quantized = [float(found.get("quantized") or 0) for found in tasks.values()]
        axes.errorbar(
            quantized, [row + 0.2 for row in range(len(tasks))], xerr=errors, fmt="none", ecolor=INK, elinewidth=0.9
        )
        axes.set_yticks(range(len(tasks)), list(tasks))
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel("score")
        legend(chart, axes, 2)
    title = "Zero-shot tasks"
    rows = [
        [task, str(found.get("metric", "")), *(_score(found.get(key)) for key in (*names, "stderr"))]
        for task, found in tasks.items()
    ]  # fmt: skip
    text = "Lines are one standard error of the quantized model's score."
    return Picture(title, chart.svg(title), text, ["task", "metric", *names.values(), "standard error"], rows)


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
