"""Layers as checkpoints on the hub have them: those that are in parts here are one, under the names of files.

Parts of a merged layer read one input, and each row has scales of its own, so that their rows in the order of the whole
are exactly the rows of the whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..boa.scheme import QuantizationScheme
from ..boa.solver.rounding import Quantized
from ..models.families import Family, Merged
from ..models.shape import Shape

_MIXTRAL = (
    (r"\.mlp\.experts\.(\d+)\.gate_proj\.", r".block_sparse_moe.experts.\1.w1."),
    (r"\.mlp\.experts\.(\d+)\.up_proj\.", r".block_sparse_moe.experts.\1.w3."),
    (r"\.mlp\.experts\.(\d+)\.down_proj\.", r".block_sparse_moe.experts.\1.w2."),
    (r"\.mlp\.(gate|e_score_correction_bias)\b", r".block_sparse_moe.\1"),
)
_ON_THE_HUB: Mapping[str, tuple[tuple[str, str], ...]] = {
    "mixtral": _MIXTRAL,
    "minimax_m2": _MIXTRAL,
    "ernie4_5_moe": ((r"\.mlp\.gate\.moe_statics\.", ".mlp.moe_statics."),),
}
"""By model_type (pattern, replacement) from names of modules to those of files, the inverse of `Family.renamed`."""


def can_join(family: Family) -> bool:
    """Whether what is stored of every kind of block can be as the hub has it: no expert is a part of a tensor, and all
    parts of a merged layer are quantized.
    """
    kinds = family.all_kinds if family.blocks else (family, *(_kind(family, kind) for kind in family.kinds or {}))
    whole = all(set(parts_of(merged)) <= set(own.projections) for own in kinds for merged in own.merged)
    return whole and not family.fused


def _kind(family: Family, kind: str) -> Family:
    return replace(family, kinds=None, **(family.kinds or {})[kind])


def parts_of(merged: Merged) -> list[str]:
    """The names inside a block of the parts of a merged layer."""
    return [f"{merged.name}.{part}" for part in merged.parts]


def on_the_hub(name: str, family: Family) -> str:
    """What a file calls a tensor, or a layer."""
    found = f"{name}."
    for pattern, replacement in _ON_THE_HUB.get(family.model_type, ()):
        found = re.sub(pattern, replacement, found)
    return found[:-1]


def joined_names(names: Iterable[str], family: Family) -> list[str]:
    """Full names of projections as files have them, of one merged layer once."""
    found = dict[str, None]()
    for name in names:
        index, _, inside = name.removeprefix(f"{family.layers}.").partition(".")
        whole = next((m.name for m in family.at(int(index)).merged if inside in parts_of(m)), inside)
        found[on_the_hub(f"{family.layers}.{index}.{whole}", family)] = None
    return list(found)


def divided_layer(schemes: Mapping[str, QuantizationScheme], family: Family) -> str:
    """The first merged layer of a block whose parts have several `schemes`; "" where none has."""
    found = (m.name for m in family.merged if len({schemes[part] for part in parts_of(m) if part in schemes}) > 1)
    return next(found, "")


def joined(
    quantized: dict[str, Quantized], tensors: dict[str, Tensor], family: Family, shape: Shape
) -> tuple[dict[str, Quantized], dict[str, Tensor]]:
    """The projections and the other tensors of a block, by names inside it, with the parts of merged layers as one.

    Args:
        quantized, tensors: as `Finished.split` has them; not changed.
        family, shape: of the block.
    """
    quantized, tensors = dict(quantized), dict(tensors)
    for merged in family.merged:
        parts, groups = parts_of(merged), int(getattr(shape, merged.groups)) if merged.groups else 1
        if all(part in quantized for part in parts):
            found = [quantized.pop(part) for part in parts]
            integers, scale, zero = (
                rows_of([getattr(one, field) for one in found], groups) for field in ("integers", "scale", "zero")
            )
            quantized[merged.name] = replace(found[0], integers=integers, scale=scale, zero=zero)
        for kind in ("weight", "bias"):
            names = [f"{part}.{kind}" for part in parts]
            if all(name in tensors for name in names):
                tensors[f"{merged.name}.{kind}"] = rows_of([tensors.pop(name) for name in names], groups)
    return quantized, tensors


def rows_of(parts: list[Tensor], groups: int) -> Tensor:
    """The rows of a merged layer, of those of its parts: so many equal groups, each with a piece of every part."""
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)
