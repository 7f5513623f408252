"""Scales and zero points.

A row (or a group of its columns) is stored as integers I in 0 .. 2^b - 1, and means `scale * (I - zero)`. The zero
point is an integer of the same range; a symmetric grid fixes it at 2^(b-1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHRINKS = 100
_CHUNK = 1 << 24  # elements of one batch of candidate errors


@dataclass(frozen=True)
class GridSettings:
    """How scale and zero point are chosen.

    | method | error that the shrink search minimises |
    |---|---|
    | minmax | none: the full range |
    | diagonal | e diag(H_in) e^T |
    | hessian | e H_in e^T |
    """

    bits: int
    symmetric: bool = False
    method: str = "hessian"

    @property
    def levels(self) -> int:
        """The largest integer."""
        return 2**self.bits - 1


def snap(scale: Tensor) -> Tensor:
    """The scale as it will be stored: float16. Integers are chosen for exactly this value."""
    return scale.clamp(2.0**-24, 65504.0).to(torch.float16).to(scale.dtype)


def round_to(weight: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """The integers nearest to `weight`, in its dtype; shapes broadcast."""
    return (weight / scale + zero).round_().clamp_(0, levels)


def search(weight: Tensor, h_in: Tensor | None, settings: GridSettings) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row.

    Args:
        weight: (B, R, g): R rows over g columns.
        h_in: (B, g, g) Hessian of those columns; None is the identity.

    Returns:
        scale and zero, (B, R) each. The range min .. max is shrunk in `SHRINKS` steps down to 1/5 of it, and the zero
        point tried with both roundings, as in the papers' grid search.
    """
    low, high = weight.amin(-1).clamp_max(0), weight.amax(-1).clamp_min(0)
    if settings.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    full = (high - low) / settings.levels
    full = torch.where(full > 0, full, torch.ones_like(full))
    if settings.method == "minmax":
        scale = snap(full)
        return scale, _zero(low, scale, settings, up=False, exact=True)
    shrinks = 1 - 0.8 * torch.arange(SHRINKS, dtype=weight.dtype, device=weight.device) / SHRINKS
    best = torch.full_like(full, float("inf"))
    best_scale, best_zero = snap(full), _zero(low, snap(full), settings, up=False, exact=True)
    step = max(1, _CHUNK // weight.numel())
    for part in shrinks.split(step):
        scale = snap(full[..., None] * part)  # (B, R, S)
        for up in (False,) if settings.symmetric else (False, True):
            zero = _zero(low[..., None] * part, scale, settings, up=up)
            s, z = scale[..., None], zero[..., None]
            error = (round_to(weight[:, :, None], s, z, settings.levels) - z) * s - weight[:, :, None]
            cost = _cost(error, h_in, settings)
            value, index = cost.min(-1)
            better = value < best
            best = torch.where(better, value, best)
            index = index[..., None]
            best_scale = torch.where(better, scale.gather(-1, index)[..., 0], best_scale)
            best_zero = torch.where(better, zero.gather(-1, index)[..., 0], best_zero)
    return best_scale, best_zero


def _zero(low: Tensor, scale: Tensor, settings: GridSettings, *, up: bool, exact: bool = False) -> Tensor:
    if settings.symmetric:
        return torch.full_like(scale, float(2 ** (settings.bits - 1)))
    real = -low / scale
    rounded = real.round() if exact else real.ceil() if up else real.floor()
    return rounded.clamp_(0, settings.levels)


def _cost(error: Tensor, h_in: Tensor | None, settings: GridSettings) -> Tensor:
    """(B, R, S) for `error` (B, R, S, g)."""
    if h_in is None:
        return error.square().sum(-1)
    if settings.method == "diagonal":
        return (error.square() * h_in.diagonal(dim1=-2, dim2=-1)[:, None, None].to(error.dtype)).sum(-1)
    flat = error.flatten(1, 2)
    return ((flat @ h_in.to(error.dtype)) * flat).sum(-1).unflatten(1, error.shape[1:3])
