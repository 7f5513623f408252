"""report.html of run folders: reads what runs left, and writes the page of `eval.report` into each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ...errors import InputError
from ..console.progress import short_layer
from ..storage.atomic import write_text
from ..storage.files import REPORT, read_manifest, read_report, tensor_sizes
from ..storage.manifest import BlockEntry
from .activation_profile import ACTIVATIONS
from .comparing import comparison, short_names, table

if TYPE_CHECKING:
    from ...eval.drawing.figures import Layer

PAGE = "report.html"
SIBLINGS = 40  # runs beside the page's own, at most


def write_page(run: Path, others: Sequence[Path]) -> Path:
    """Make the page of a finished run, beside `others`; returns where it is.

    Raises:
        InputError: a file of one of the runs is missing or damaged, or the page cannot be written.
    """
    from ...eval.drawing.report import Contents, page

    blocks, report = read_manifest(run).blocks, read_report(run)
    rows = comparison([(run, report), *((other, read_report(other)) for other in others)])
    contents = Contents(
        report=report,
        rows=rows,
        columns=table(rows),
        layers=_layers(blocks),
        block_seconds=[(block.index, block.seconds or 0.0) for block in blocks],
        storage=_storage(run, rows[0]["sizes"].get("quantized", 0)),
        activations=_activations(run),
        datasets=short_names(list(dict.fromkeys([*rows[0]["perplexity"], *rows[0]["divergence"]]))),
    )
    try:
        write_text(run / PAGE, page(contents))
    except OSError as error:
        raise InputError(f"{run / PAGE} cannot be written ({error.strerror}): make room, or copy the run.") from error
    return run / PAGE


def siblings(run: Path) -> list[Path]:
    """Other finished runs in the folder that a run lies in, the newest first; what is no run is passed over."""
    found = []
    for report in run.absolute().parent.glob(f"*/{REPORT}"):
        other = report.parent
        if other.name == run.absolute().name:
            continue
        try:
            read_report(other)
        except InputError:
            continue
        found.append(other)
    newest = sorted(found, key=lambda other: (other / REPORT).stat().st_mtime, reverse=True)
    return sorted(newest[:SIBLINGS])


def _layers(blocks: Sequence[BlockEntry]) -> list[Layer]:
    """The losses of each block's projections; of experts the mean. Without references, the run's own loss alone."""
    from ...eval.drawing.figures import Layer

    layers = []
    for block in blocks:
        grouped: dict[str, list[dict[str, float]]] = {}
        for name, layer in block.layers.items():
            losses = layer.objective or {"quantized": layer.loss}
            grouped.setdefault(short_layer(name), []).append(losses)
        for name, found in grouped.items():
            losses = {key: mean(losses[key] for losses in found) for key in found[0]}
            layers.append(Layer(block.index, name, losses))
    return layers


def _storage(run: Path, exported: int) -> dict[str, dict[str, int]]:
    """Bytes of each projection of the finished blocks by kind, and of all else that is exported."""
    parts: dict[str, dict[str, int]] = {}
    other = 0
    kinds = {"qweight": "integers", "scale": "scales, zero points", "zero": "scales, zero points"}
    kinds["global_scale"] = kinds["scale"]
    for path in sorted((run / "blocks").glob("*.safetensors")):
        for name, size in tensor_sizes(path).items():
            module, _, last = name.rpartition(".")
            if last in kinds:
                part = parts.setdefault(short_layer(module), {})
                part[kinds[last]] = part.get(kinds[last], 0) + size
            else:
                other += size
    outer = exported - other - sum(size for part in parts.values() for size in part.values())
    parts["norms and biases"] = {"not quantized": other}
    parts["embedding, head"] = {"not quantized": max(outer, 0)}
    return {name: part for name, part in parts.items() if any(part.values())}


def _activations(run: Path) -> dict[str, np.ndarray]:
    """What the run measured of its activations; empty where it did not."""
    path = run / ACTIVATIONS
    if not path.is_file():
        return {}
    try:
        found: dict[str, np.ndarray] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): run the recipe again.") from error
    return found
