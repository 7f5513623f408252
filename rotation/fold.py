"""Norm weights folded into the layers that read them: afterwards every RMSNorm multiplies by exactly 1."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.families import Family


def fold_norms(block: dict[str, Tensor], family: Family) -> None:
    """Fold both norms of a block, in place; tensors of `block` are float64 and named as inside the block.

    `W x^ = (W diag(w)) (x / rms)`: exact, since RMSNorm multiplies by its weight last (QuaRot, section 4).
    """
    for norm, readers in (
        (family.attention_norm, (family.query, family.key, family.value)),
        (family.mlp_norm, (family.gate, family.up)),
    ):
        weight = block[f"{norm}.weight"] + family.norm_offset
        for reader in readers:
            block[f"{reader}.weight"] = block[f"{reader}.weight"] * weight
        block[f"{norm}.weight"] = neutral(weight, family)


def neutral(weight: Tensor, family: Family) -> Tensor:
    """The stored weight with which the family's norm multiplies by 1, shaped like `weight` (hidden,)."""
    return torch.full_like(weight, 1.0 - family.norm_offset)
