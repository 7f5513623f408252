"""Runs side by side: one row a run, as Markdown to read, CSV to compute with, JSON to keep. Needs no torch."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ...errors import InputError
from ..console.human import human_size, human_time
from ..console.progress import MODELS
from ..storage.run_report import Report

Cell = Callable[[Mapping[str, Any]], str]  # of a row
Format = Literal["markdown", "csv", "json"]
SUFFIXES: dict[str, Format] = {".md": "markdown", ".csv": "csv", ".json": "json"}
SAME_TEXT = 1e-3  # relative: full precision on the same text is the same but for the order of sums


def format_of(output: Path | None) -> Format:
    """The format that a file's name asks for; Markdown for the screen.

    Raises:
        InputError: the name asks for none of them.
    """
    if output is None:
        return "markdown"
    try:
        return SUFFIXES[output.suffix.lower()]
    except KeyError:
        raise InputError(f"{output} ends in none of {', '.join(SUFFIXES)}: give --format.") from None


def comparison(runs: Sequence[tuple[Path, Report]]) -> list[dict[str, Any]]:
    """A row for each run, from its folder and its report; what a report lacks is None or empty.

    Returns:
        Dictionaries with `run`, `model`, `method`, `group_size`, `activation_group`, `bits` (`weights`, `activations`,
        `keys`, `values`, and `per_weight`, scales and zero points included), `sizes` in bytes, `perplexity` by data set
        and model, `divergence` by data set, `tasks`, `seconds`, `plain_forward_seconds`, `peak_memory_bytes`, and
        `notes`: what is not the same as in the first run, and so makes figures incomparable.
    """
    names = short_names([str(run) for run, _ in runs])
    rows = [{"run": names[str(run)], **_row(report)} for run, report in runs]
    for row, (_, report) in zip(rows, runs, strict=True):
        row["notes"] = _differences(row, report, rows[0], runs[0][1])
    return rows


def _row(report: Report) -> dict[str, Any]:
    recipe = report.shown
    return {
        "model": report.model,
        "method": recipe.weights.method,
        "group_size": recipe.weights.group_size,
        "activation_group": recipe.activations.group_size,
        "bits": {
            "weights": recipe.weights.bits if report.budget is None else round(report.bits_per_weight or 0, 2),
            "activations": recipe.activations.bits,
            "keys": recipe.cache.key_bits,
            "values": recipe.cache.value_bits,
            "per_weight": report.bits_per_weight,
        },
        "sizes": report.sizes.to_json(),
        "perplexity": {dataset: measured.to_json() for dataset, measured in report.perplexity.items()},
        "divergence": {dataset: {"kl": far.kl, "top1": far.top1} for dataset, far in report.divergence.items()},
        "tasks": {
            task: found.model_dump(include={"metric", "full_precision", "quantized", "stderr"})
            for task, found in report.tasks.items()
        },
        "seconds": report.seconds,
        "plain_forward_seconds": report.plain_forward_seconds,
        "peak_memory_bytes": report.peak_memory_bytes,
    }


def _differences(row: Mapping[str, Any], report: Report, first: Mapping[str, Any], first_report: Report) -> list[str]:
    """What keeps the figures of a run from being compared with those of the first one."""
    notes = []
    if row["model"] != first["model"]:
        notes.append("other model")
    shared = [dataset for dataset in row["perplexity"] if dataset in first["perplexity"]]
    texts = [set(part["perplexity"]) for part in (row, first)]
    windows = [([r.tokens.evaluation.get(dataset) for dataset in shared], r.bos) for r in (report, first_report)]
    splits = [r.shown.evaluation.split for r in (report, first_report)]
    if texts[0] != texts[1]:
        notes.append("other evaluation text")
    if shared and windows[0] != windows[1]:
        notes.append("other evaluation windows")
    elif shared and splits[0] != splits[1]:
        notes.append("other split of the evaluation text")
    elif row["model"] == first["model"]:
        # The same name, the same number of windows: another release of the data set would still show here.
        for dataset in shared:
            ours, theirs = (part["perplexity"][dataset].get("full_precision") for part in (row, first))
            if ours and theirs and abs(ours / theirs - 1) > SAME_TEXT:
                notes.append(f"other full precision on {dataset}")
    if report.device != first_report.device:
        notes.append("other device")
    return notes


def short_names(names: Sequence[str]) -> dict[str, str]:
    """What to call paths: the last part of each, unless another has the same, or the name is no path."""
    last = {name: Path(name).name if Path(name).is_absolute() or len(Path(name).parts) > 1 else name for name in names}
    counts = Counter(last[name] for name in set(names))
    return {name: short if short and counts[short] == 1 else name for name, short in last.items()}


def render(rows: Sequence[Mapping[str, Any]], form: Format) -> str:
    """The rows of `comparison` as text that ends with a newline."""
    if form == "json":
        return json.dumps(rows, indent=2) + "\n"
    return _csv(rows) if form == "csv" else _markdown(rows)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A column for each leaf, by its dotted name, in the units of the JSON."""
    flat = [_flatten(row) for row in rows]
    columns = list(dict.fromkeys(name for group in rows[0] for row in flat for name in row if _starts(name, group)))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return stream.getvalue()


def _starts(name: str, group: str) -> bool:
    return name == group or name.startswith(f"{group}.")


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {k: v for name, item in value.items() for k, v in _flatten(item, f"{prefix}.{name}".strip(".")).items()}
    if isinstance(value, list):
        return {prefix: "; ".join(value)}
    return {prefix: "" if value is None else value}


def table(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Columns to read, each a title and a cell for each row of `comparison`; those that no run fills are left out."""
    datasets = _keys(rows, "perplexity")
    divergent, tasks = _keys(rows, "divergence"), _keys(rows, "tasks")
    short = short_names([*datasets, *divergent])
    models = short_names([row["model"] for row in rows])
    columns: list[tuple[str, Cell]] = [
        ("run", lambda row: row["run"]),
        ("model", lambda row: models[row["model"]]),
        ("method", lambda row: row["method"]),
        ("W", lambda row: f"{row['bits']['weights']}"),
        ("A", lambda row: f"{row['bits']['activations']}"),
        ("K", lambda row: f"{row['bits']['keys']}"),
        ("V", lambda row: f"{row['bits']['values']}"),
        ("group", lambda row: f"{row['group_size'] or ''}"),
        ("group of A", lambda row: f"{row['activation_group'] or ''}"),
        ("bits per weight", lambda row: _cell(row["bits"]["per_weight"], "{:.2f}")),
        ("size", lambda row: _size(row["sizes"].get("quantized"))),
        ("original size", lambda row: _size(row["sizes"].get("original"))),
    ]
    for dataset in datasets:
        for key, label in MODELS.items():
            columns.append((f"perplexity on {short[dataset]}, {label}", _figure("perplexity", dataset, key, "{:,.3f}")))
    for dataset in divergent:
        columns.append((f"KL on {short[dataset]}", _figure("divergence", dataset, "kl", "{:.4f}")))
        columns.append((f"top-1 agreement on {short[dataset]}", _figure("divergence", dataset, "top1", "{:.1%}")))
    for task in tasks:
        metric = next(row["tasks"][task]["metric"] for row in rows if task in row["tasks"])
        name = f"{task} ({metric})" if metric else task
        columns.append((f"{name}, {MODELS['full_precision']}", _figure("tasks", task, "full_precision", "{:.3f}")))
        columns.append((f"{name}, {MODELS['quantized']}", partial(_score, task)))
    columns += [
        ("quantization", lambda row: _cell(row["seconds"].get("quantize"), human_time)),
        ("whole run", lambda row: _cell(row["seconds"].get("total"), human_time)),
        ("memory", lambda row: _size(row["peak_memory_bytes"].get("host"))),
        ("GPU memory", lambda row: _size(row["peak_memory_bytes"].get("device"))),
        ("notes", lambda row: "; ".join(row["notes"])),
    ]
    filled = [(title, [cell(row) for row in rows]) for title, cell in columns]
    return [(title, cells) for title, cells in filled if any(cells)]


def _keys(rows: Sequence[Mapping[str, Any]], group: str) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row[group]))


def _cell(value: float | None, form: str | Callable[[float], str]) -> str:
    if value is None:
        return ""
    return form.format(value) if isinstance(form, str) else form(value)


def _size(value: int | None) -> str:
    return _cell(value, human_size)


def _figure(group: str, name: str, key: str, form: str) -> Cell:
    return lambda row: _cell(row[group].get(name, {}).get(key), form)


def _score(task: str, row: Mapping[str, Any]) -> str:
    """The quantized model's, with its standard error."""
    found = row["tasks"].get(task, {})
    error = f" ± {found['stderr']:.3f}" if found.get("stderr") is not None else ""
    return _cell(found.get("quantized"), "{:.3f}" + error)


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = table(rows)
    words = {"run", "model", "method", "notes"}
    lines = [
        [title for title, _ in columns],
        ["---" if title in words else "--:" for title, _ in columns],
        *zip(*(cells for _, cells in columns), strict=True),
    ]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
