"""What leading directions of inputs cost a model that runs: of a plan, and of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...boa.online.directions import LeadingDirections
from ...export.finished import Finished, numbers_in_blocks, projection_columns, projection_rows
from ...export.spec import Spec
from ...models.families import Family
from ...models.shape import Shape
from ..storage.manifest import Manifest
from ..storage.run_folder import RunFolder


def direction_costs(spec: Spec, family: Family, shape: Shape) -> dict[str, Any] | None:
    """How many directions D (c, k) an input keeps in 8 bits, and their cost; None where there are none.

    `products`: multiplications by them over those by the weights of all projections. A projection of r outputs takes
    its coefficients, what they leave of the input, and their product with W D: 2 c k + k r beside c r. `bytes` of D as
    it is stored in 16 bits, once for those that read one input, and `bits_per_weight` of the blocks' weights.
    """
    beside = weights = stored = 0
    for index in range(shape.blocks):
        transforms = spec.transforms(shape, family, index)
        rows, columns = projection_rows(family, shape, index), projection_columns(family, shape, index)
        for name, transform in transforms.by_projection(family.at(index)).items():
            weights += columns[name] * rows[name]
            if isinstance(transform.quantizer, LeadingDirections):
                beside += transform.quantizer.directions.shape[1] * (2 * columns[name] + rows[name])
        found = transforms.scales(family.at(index))
        stored += sum(part.numel() for name, part in found.items() if name.endswith(".input_directions"))
    if not beside:
        return None
    return {
        "kept": spec.activation_directions,
        "products": beside / weights,
        "bytes": 2 * stored,
        "bits_per_weight": 16 * stored / numbers_in_blocks(family, shape),
    }


def direction_costs_of_run(run: Path, manifest: Manifest) -> dict[str, Any] | None:
    """Those of a run whose model is written; else None.

    Raises:
        InputError: its model cannot be read.
    """
    if not (run / "model" / "config.json").is_file():
        return None
    folder = RunFolder(run, manifest)
    found = Finished.open(run / "model", [folder.block_path(index) for index in range(len(manifest.blocks))])
    return direction_costs(found.spec, found.family, found.shape)
