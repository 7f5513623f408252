"""Scales and zero points.

A row (or a group of its columns) is stored as integers I in 0 .. 2^b - 1, and means `scale * (I - zero)`. The zero
point is an integer of the same range; a symmetric grid fixes it at 2^(b-1). Floating point is integers too, of which
some are left out (`kernels.levels`), with scales that are storable in its format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import stored_scales
from ..kernels.levels import E2M1, E4M3, UNITS, middle_of
from ..kernels.squares import rounding_errors, weighted_squares
from ..stopwatch import stage

SHRINKS = 48
_CHUNK = 1 << 22  # elements of one batch of candidate errors
_ON_A_GPU = 16  # times as many: there it is the number of operations that counts


@dataclass(frozen=True)
class GridSettings:
    """How scale and zero point are chosen.

    | method | error that the shrink search minimises |
    |---|---|
    | minmax | none: the full range |
    | diagonal | e diag(H_in) e^T |
    | hessian | e H_in e^T |

    That of all of H_in is what counts where outliers make it nearly singular, so without a rotation. After one, the
    error that compensation leaves is closer to that of the diagonal. A grid of floating point (`format`) is searched
    over the storable scales next to that of the full range.
    """

    bits: int
    symmetric: bool = False
    method: str = "diagonal"
    format: str = "int"
    global_scale: float = 1.0

    @property
    def levels(self) -> int:
        """The largest integer."""
        return 2**self.bits - 1 if self.format == "int" else E4M3 if self.format == "fp8" else E2M1

    def snap(self, scale: Tensor) -> Tensor:
        """The scale as it will be stored. Integers are chosen for exactly this value."""
        if self.format == "int":
            return snap(scale)
        unit = UNITS[self.format]  # the scales of values are so many times these
        return stored_scales.nearest(unit * scale, self.format, self.global_scale) / unit

    def beside(self, scale: Tensor, steps: Tensor | int) -> Tensor:
        """Of floating point, the scales so many storable ones above `scale`."""
        unit = UNITS[self.format]
        return stored_scales.beside(unit * scale, steps, self.format, self.global_scale) / unit


def snap(scale: Tensor) -> Tensor:
    """The scale of integers as it will be stored: float16."""
    return scale.clamp(2.0**-24, 65504.0).to(torch.float16).to(scale.dtype)


@stage("grid search")
def search(weight: Tensor, h_in: Tensor | None, settings: GridSettings) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row.

    Args:
        weight: (B, R, g): R rows over g columns.
        h_in: (B, g, g) Hessian of those columns; None is the identity.

    Returns:
        scale and zero, (B, R) each. The range min .. max is shrunk in `SHRINKS` steps down to 1/5 of it, and the zero
        point tried with both roundings.
    """
    # Rows are independent: in parts, the candidates' errors stay small.
    rows = max(1, _CHUNK * (_ON_A_GPU if weight.is_cuda else 1) // (2 * SHRINKS * weight.shape[0] * weight.shape[2]))
    parts = [_search(part, h_in, settings) for part in weight.split(rows, 1)]
    return torch.cat([scale for scale, _ in parts], 1), torch.cat([zero for _, zero in parts], 1)


def _search(weight: Tensor, h_in: Tensor | None, settings: GridSettings) -> tuple[Tensor, Tensor]:
    low, high = weight.amin(-1).clamp_max(0), weight.amax(-1).clamp_min(0)
    if settings.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    if settings.format != "int":
        return _search_storable(weight, high, h_in, settings)
    full = (high - low) / settings.levels
    full = torch.where(full > 0, full, torch.ones_like(full))
    if settings.method == "minmax":
        scale = snap(full)
        return scale, _zero(low, scale, settings, up=False, exact=True)
    return _best(weight, *_candidates(low, full, settings, weight), h_in, settings)


def _search_storable(
    weight: Tensor, peak: Tensor, h_in: Tensor | None, settings: GridSettings
) -> tuple[Tensor, Tensor]:
    scale = stored_scales.full_range(peak, settings.format, settings.global_scale)
    if settings.format == "fp8":  # of the others those of the full range are storable
        scale = stored_scales.at_least(scale)
    scale = scale / UNITS[settings.format]
    if settings.method == "minmax":
        return scale, _zero(scale, scale, settings, up=False)
    offsets = torch.tensor(stored_scales.OFFSETS[settings.format], device=scale.device)
    scales = settings.beside(scale[..., None].expand(*scale.shape, len(offsets)), offsets)
    return _best(weight, scales, _zero(scales, scales, settings, up=False), h_in, settings)


def _best(
    weight: Tensor, scale: Tensor, zero: Tensor, h_in: Tensor | None, settings: GridSettings
) -> tuple[Tensor, Tensor]:
    """Of the candidates (B, R, S) the one with the least error, (B, R)."""
    if h_in is None or settings.method == "diagonal":
        metric = weight.new_ones(1, weight.shape[2]) if h_in is None else h_in.diagonal(dim1=-2, dim2=-1)
        cost = weighted_squares(weight, scale, zero, metric.to(weight.dtype), settings.levels)
    else:
        flat = rounding_errors(weight, scale, zero, settings.levels).flatten(1, 2)
        cost = ((flat @ h_in.to(flat.dtype)) * flat).sum(-1).view_as(scale)
    best = cost.argmin(-1, keepdim=True)
    return scale.gather(-1, best)[..., 0], zero.gather(-1, best)[..., 0]


def _candidates(low: Tensor, full: Tensor, settings: GridSettings, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(B, R, S) scales and zero points."""
    shrinks = 1 - 0.8 * torch.arange(SHRINKS, dtype=weight.dtype, device=weight.device) / SHRINKS
    scale = snap(full[..., None] * shrinks)
    if settings.symmetric:
        return scale, _zero(low[..., None], scale, settings, up=False)
    zeros = [_zero(low[..., None] * shrinks, scale, settings, up=up) for up in (False, True)]
    return torch.cat([scale, scale], -1), torch.cat(zeros, -1)


def _zero(low: Tensor, scale: Tensor, settings: GridSettings, *, up: bool, exact: bool = False) -> Tensor:
    if settings.symmetric:
        return torch.full_like(scale, float(middle_of(settings.levels)))
    real = -low / scale
    rounded = real.round() if exact else real.ceil() if up else real.floor()
    return rounded.clamp_(0, settings.levels)
