"""Scales of scales: the two-level grids of llama.cpp's K types, in super-blocks of 256 weights of a row.

| format | a weight | group | d, dmin | sc | m |
|---|---|---|---|---|---|
| q2_k | d * sc * q - dmin * m, q of 2 bits | 16 | float16 | 1 to 15 | 0 to 15 |
| q3_k | d * sc * (q - 4), q of 3 bits | 16 | float16 | 1 to 31 | none |
| q4_k | d * sc * q - dmin * m, q of 4 bits | 32 | float16 | 1 to 63 | 0 to 63 |
| q5_k | the same, q of 5 bits | 32 | float16 | 1 to 63 | 0 to 63 |
| q6_k | d * sc * (q - 32), q of 6 bits | 16 | float16 | 1 to 127 | none |

A group's scale is d * sc, exact in float32, and its zero point dmin * m / (d * sc), which is no integer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scheme import SUPER, TWO_LEVELS

TOPS = {"q2_k": (15, 15), "q3_k": (31, 0), "q4_k": (63, 63), "q5_k": (63, 63), "q6_k": (127, 0)}
"""The largest sc and the largest m; 0: there are no m."""
_SHRINKS = 24
_SMALLEST = 2.0**-24


def nearest(values: Tensor, weights: Tensor, per: int, top: int, least: int) -> tuple[Tensor, Tensor]:
    """The factors whose products come nearest to `values`.

    Args:
        values: (..., groups), none below zero.
        weights: of the squared errors, likewise.
        per: groups of a super-block.
        top, least: of the integers.

    Returns:
        d (..., groups / per), float16 as float32, and integers (..., groups) in float32. Of `_SHRINKS` d, from that of
        the largest value on, the best; then once more in closed form for its integers.
    """
    v, w = (part.float().unflatten(-1, (-1, per)) for part in (values, weights))
    w = w.clamp_min(1e-30)
    peak = v.amax(-1, keepdim=True)
    best_d, best_q = torch.zeros_like(peak), torch.full_like(v, float(least))
    lowest = torch.full_like(peak, torch.inf)
    tops = [top * (1 - 0.3 * i / _SHRINKS) for i in range(_SHRINKS)]
    for step in [*tops, 0.0]:
        if step:
            d = peak / step
        else:
            d = (w * v * best_q).sum(-1, keepdim=True) / (w * best_q * best_q).sum(-1, keepdim=True).clamp_min(1e-30)
        d = torch.where(peak > 0, d.clamp(_SMALLEST, 65504.0), 0).half().float()
        q = torch.where(d > 0, v / d, least).round().clamp(least, top)
        cost = (w * (d * q - v).square()).sum(-1, keepdim=True)
        better = cost < lowest
        lowest = torch.where(better, cost, lowest)
        best_d, best_q = torch.where(better, d, best_d), torch.where(better, q, best_q)
    return best_d[..., 0], best_q.flatten(-2)


def factors(products: Tensor, per: int, top: int) -> tuple[Tensor, Tensor]:
    """d and integers of products of both, as of `nearest`: which of several pairs does not matter.

    Raises:
        ValueError: they are no products.
    """
    v = products.double().unflatten(-1, (-1, per))
    peak = v.amax(-1, keepdim=True)
    best_d, best_q = torch.zeros_like(peak), torch.zeros_like(v)
    lowest = torch.where(peak > 0, torch.full_like(peak, torch.inf), 0)
    for largest in range(1, top + 1):
        d = (peak / largest).half().double()
        q = torch.where(d > 0, v / d, 0).round()
        error = ((d * q - v).abs() / peak.clamp_min(1e-300)).amax(-1, keepdim=True)
        better = (error < lowest) & (d > 0) & (q.amax(-1, keepdim=True) <= top)
        lowest = torch.where(better, error, lowest)
        best_d, best_q = torch.where(better, d, best_d), torch.where(better, q, best_q)
    if (lowest > 2.0**-20).any():
        raise ValueError("these scales are not of two levels")
    return best_d[..., 0].float(), best_q.flatten(-2).float()


def grid(d: Tensor, sc: Tensor, dmin: Tensor | None, m: Tensor | None, middle: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of groups, float32: d, dmin (..., groups / per), sc, m (..., groups)."""
    per = sc.shape[-1] // d.shape[-1]
    scale = d.float().repeat_interleave(per, -1) * sc.float()
    if dmin is None or m is None:
        return scale, torch.full_like(scale, float(middle))
    offset = dmin.float().repeat_interleave(per, -1) * m.float()
    return scale, torch.where(scale > 0, offset / scale, 0)


def parts_of(scale: Tensor, zero: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The inverse of `grid`, of scales and zero points (..., groups) of the format `name`: d, sc, dmin, m.

    Raises:
        ValueError: they are of another grid.
    """
    top, offsets = TOPS[name]
    per = SUPER // TWO_LEVELS[name][1]
    d, sc = factors(scale, per, top)
    return d, sc, *(factors(scale.double() * zero, per, offsets) if offsets else (None, None))
