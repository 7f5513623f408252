"""Rounding to a grid, and the squared errors of many grids at once."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .compiled import is_compiled, spread
from .levels import is_float, nearest, nearest_float


def round_to(weight: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """The integers of the grid nearest to `weight`, in its dtype; shapes broadcast."""
    return nearest(weight / scale, zero, levels)


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
    return (rounding_errors(weight, scale, zero, levels).square_() @ metric[:, None, :, None])[..., 0]


def rounding_errors(weight: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """(B, R, S, g) rounding errors of every row on every candidate grid."""
    s, z, w = scale[..., None], zero[..., None], weight[:, :, None]
    return round_to(w, s, z, levels).sub_(z).mul_(s).sub_(w)


@njit(nogil=True, cache=True, fastmath={"reassoc", "nsz"})  # sums in any order, division and rounding exact
def _weigh_rows(weight, scale, zero, metric, found, levels, start, stop):  # type: ignore[no-untyped-def]
    _, rows, width = weight.shape
    floating = is_float(levels)
    for index in range(start, stop):
        b, r = index // rows, index % rows
        row, h = weight[b, r], metric[b % metric.shape[0]]
        for k in range(scale.shape[2]):
            s, z = scale[b, r, k], zero[b, r, k]
            total = np.float32(0)
            if floating:
                for j in range(width):
                    error = nearest_float(row[j] / s, levels) * s - row[j]
                    total += error * error * h[j]
                found[b, r, k] = total
                continue
            for j in range(width):
                error = (min(max(np.rint(row[j] / s + z), np.float32(0)), levels) - z) * s - row[j]
                total += error * error * h[j]
            found[b, r, k] = total
