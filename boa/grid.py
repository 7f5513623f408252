"""Scales and zero points.

A row (or a group of its columns) is stored as integers I in 0 .. 2^b - 1, and means `scale * (I - zero)`. The zero
point is an integer of the same range; a symmetric grid fixes it at 2^(b-1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .compiled import is_compiled, spread
from .stopwatch import stage

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
    error that compensation leaves is closer to that of the diagonal.
    """

    bits: int
    symmetric: bool = False
    method: str = "diagonal"

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
    full = (high - low) / settings.levels
    full = torch.where(full > 0, full, torch.ones_like(full))
    if settings.method == "minmax":
        scale = snap(full)
        return scale, _zero(low, scale, settings, up=False, exact=True)
    scale, zero = _candidates(low, full, settings, weight)
    if h_in is None or settings.method == "diagonal":
        metric = weight.new_ones(1, weight.shape[2]) if h_in is None else h_in.diagonal(dim1=-2, dim2=-1)
        cost = weighted_squares(weight, scale, zero, metric.to(weight.dtype), settings.levels)
    else:
        flat = _errors(weight, scale, zero, settings.levels).flatten(1, 2)
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


def weighted_squares(weight: Tensor, scale: Tensor, zero: Tensor, metric: Tensor, levels: int) -> Tensor:
    """The sum over columns of `metric` (B or 1, g) times the squared rounding error, of every row on every grid.

    Args:
        weight: (B, R, g).
        scale, zero: (B, R, S), the candidates.
        levels: the largest integer.

    Returns:
        (B, R, S). Compiled on the CPU, where the errors themselves, S times the weight, are never held.
    """
    if is_compiled(weight):
        found = torch.empty_like(scale, memory_format=torch.contiguous_format)
        rows = weight.shape[0] * weight.shape[1]
        spread(_weigh_rows, rows, found.numel() * weight.shape[2], weight, scale, zero, metric, found, levels)
        return found
    return (_errors(weight, scale, zero, levels).square_() @ metric[:, None, :, None])[..., 0]


def _errors(weight: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """(B, R, S, g) rounding errors of every row on every candidate grid."""
    s, z, w = scale[..., None], zero[..., None], weight[:, :, None]
    return round_to(w, s, z, levels).sub_(z).mul_(s).sub_(w)


@njit(nogil=True, cache=True, fastmath={"reassoc", "nsz"})  # sums in any order, division and rounding exact
def _weigh_rows(weight, scale, zero, metric, found, levels, start, stop):  # type: ignore[no-untyped-def]
    _, rows, width = weight.shape
    for index in range(start, stop):
        b, r = index // rows, index % rows
        row, h = weight[b, r], metric[b % metric.shape[0]]
        for k in range(scale.shape[2]):
            s, z = scale[b, r, k], zero[b, r, k]
            total = np.float32(0)
            for j in range(width):
                error = (min(max(np.rint(row[j] / s + z), np.float32(0)), levels) - z) * s - row[j]
                total += error * error * h[j]
            found[b, r, k] = total


def _zero(low: Tensor, scale: Tensor, settings: GridSettings, *, up: bool, exact: bool = False) -> Tensor:
    if settings.symmetric:
        return torch.full_like(scale, float(2 ** (settings.bits - 1)))
    real = -low / scale
    rounded = real.round() if exact else real.ceil() if up else real.floor()
    return rounded.clamp_(0, settings.levels)
