"""Norms folded into the layers that read them: afterwards every norm before a projection multiplies by exactly 1."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.families import Family


def fold_norms(block: dict[str, Tensor], family: Family) -> None:
    """Fold both norms of a block, in place; tensors of `block` are float64 and named as inside the block.

    `W x^ = (W diag(w)) (x / rms)`: exact, since a norm multiplies by its weight last (QuaRot, section 4). The bias of a
    LayerNorm goes into the bias of its readers, `W (x^ + b) = W x^ + W b`, and out of the block.
    """
    for norm, names in family.norm_readers.items():
        weight = block[f"{norm}.weight"] + family.norm_offset
        shift = block.pop(f"{norm}.bias", None)
        for reader in names:
            if shift is not None:
                block[f"{reader}.bias"] = block[f"{reader}.bias"] + block[f"{reader}.weight"] @ shift
            block[f"{reader}.weight"] = block[f"{reader}.weight"] * weight
        block[f"{norm}.weight"] = neutral(weight, family)


def remove_mean(block: dict[str, Tensor], family: Family) -> None:
    """Take the mean over channels out of what is written to the residual stream, in place.

    LayerNorm subtracts that mean anyway, so nothing changes; a stream of mean zero needs an RMSNorm alone, which
    commutes with rotations. The embedding's mean goes likewise, in `rotate.Rotations.rotate_outer_layers`.
    """
    for name in (family.output, *family.downs):
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in block:
                block[f"{name}.{kind}"] = block[f"{name}.{kind}"] - block[f"{name}.{kind}"].mean(0)


def neutral(weight: Tensor, family: Family) -> Tensor:
    """The stored weight with which the family's norm multiplies by 1, shaped like `weight` (hidden,)."""
    return torch.full_like(weight, 1.0 - family.norm_offset)
