"""Scales of scales for a solved layer, and its integers again on the grid that is stored; see `super_scales`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import super_scales
from ..kernels.levels import middle_of
from ..kernels.squares import round_to
from ..objective.objective import Objective
from ..scheme import SUPER


def two_levels(
    integers: Tensor, scale: Tensor, zero: Tensor, objective: Objective | None, name: str, bits: int
) -> tuple[Tensor, Tensor]:
    """Scale and zero point (heads, r, groups) of the format `name` next to those that were found.

    What a change of a group's scale, or of its offset, costs is taken from the diagonal of H_in: the sum of h (I -
    zero)^2, or of h. Offsets are those of the found zero points at the found scales.
    """
    top, offsets = super_scales.TOPS[name]
    group = integers.shape[-1] // scale.shape[-1]
    per = SUPER // group
    diagonal = scale.new_ones(1, 1) if objective is None else objective.h_in.diagonal(dim1=-2, dim2=-1)
    h = diagonal.float()[:, None].expand(-1, 1, integers.shape[-1]).unflatten(-1, (-1, group))
    distance = integers.float().unflatten(-1, (-1, group)) - zero.float()[..., None]
    d, sc = super_scales.nearest(scale, (h * distance.square()).sum(-1), per, top, 1)
    dmin = m = None
    if offsets:
        found = scale * zero
        dmin, m = super_scales.nearest(found, h.sum(-1).expand_as(found), per, offsets, 0)
    return tuple(part.to(scale) for part in super_scales.grid(d, sc, dmin, m, middle_of(2**bits - 1)))  # type: ignore[return-value]


def rounded(weight: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """The integers (heads, r, c) nearest to a weight on a grid (heads, r, groups), uint8."""
    parts = weight.unflatten(-1, (scale.shape[-1], -1))
    return round_to(parts, scale[..., None], zero[..., None], levels).flatten(-2).to(torch.uint8)
