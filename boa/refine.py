"""After rounding: scales in closed form, integers by coordinate descent. The loss never rises.

With G = H_out E H_in, moving I[r, c] by k steps changes the loss by 2 k s G[r, c] + k^2 s^2 H_out[r, r] H_in[c, c].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import snap
from .objective import Objective

COLUMN_BLOCK = 128


def refine(
    target: Tensor,
    integers: Tensor,
    scale: Tensor,
    zero: Tensor,
    objective: Objective,
    bits: int,
    *,
    rounds: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rounds` of scales and one sweep over all columns, and the scales once more.

    It ends early where no integer moves.

    Args:
        target: (heads, r, c), W*.
        integers, scale, zero: as in `rounding.Quantized`.
        objective: damped, in float64 or float32.

    Returns:
        integers, scale, zero; the objective at them is at most what it was.
    """
    levels = 2**bits - 1
    group = target.shape[-1] // scale.shape[-1]
    h_in = objective.h_in.to(target.dtype)
    h_out = None if objective.h_out is None else objective.h_out.to(target.dtype)
    q = integers.to(target.dtype)
    scale, zero = scale.clone(), zero.clone()
    for _ in range(rounds):
        error = _dequantize(q, scale, zero) - target
        _update_scales(error, q, scale, zero, h_in, h_out)
        if sweep(error, q, scale, h_in, h_out, levels, group) == 0:
            break
    if rounds:
        _update_scales(_dequantize(q, scale, zero) - target, q, scale, zero, h_in, h_out)
    return q.to(torch.uint8), scale, zero


def _dequantize(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    parts = q.unflatten(-1, (scale.shape[-1], -1))
    return ((parts - zero[..., None]) * scale[..., None]).flatten(-2)


def _update_scales(error: Tensor, q: Tensor, scale: Tensor, zero: Tensor, h_in: Tensor, h_out: Tensor | None) -> None:
    """The best scales for fixed integers, group after group, in place; `error` follows.

    With V = I - zero (r, g columns), the loss is quadratic in the change d of a group's scales (r,):
    d^T M d + 2 b^T d, M = H_out * (V H_in V^T) elementwise, b_r = (G V^T)[r, r]. Stored scales are float16, so a row
    (a head, where H_out ties its rows) keeps its scale where rounding it would not lower the loss.
    """
    groups = scale.shape[-1]
    size = q.shape[-1] // groups
    for g in range(groups):
        span = slice(g * size, (g + 1) * size)
        v = q[..., span] - zero[..., g, None]
        local = h_in[:, span, span]
        inner = error @ h_in[:, :, span]
        gradient = inner if h_out is None else h_out @ inner
        b = (gradient * v).sum(-1)
        vh = v @ local
        if h_out is None:
            m = (vh * v).sum(-1)
            delta = torch.where(m > 0, -b / m, torch.zeros_like(b))
        else:
            m = (h_out * (vh @ v.transpose(-1, -2))).double()
            ridge = 1e-9 * m.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(1e-30)
            m = m + torch.diag_embed(ridge.expand(m.shape[:-1]))
            delta = -torch.linalg.solve(m, b.double()[..., None])[..., 0].to(b.dtype)
            m = m.to(b.dtype)
        old = scale[..., g]
        new = snap((old + delta).clamp_min(0.05 * old))
        delta = new - old
        if h_out is None:
            gain = delta * (2 * b + m * delta)
            delta = torch.where(gain < 0, delta, torch.zeros_like(delta))
        else:
            gain = (delta * (2 * b + (m @ delta[..., None])[..., 0])).sum(-1, keepdim=True)
            delta = torch.where(gain < 0, delta, torch.zeros_like(delta))
        scale[..., g] = torch.where(delta != 0, new, old)
        error[..., span] += delta[..., None] * v


def sweep(error: Tensor, q: Tensor, scale: Tensor, h_in: Tensor, h_out: Tensor | None, levels: int, group: int) -> int:
    """One pass of coordinate descent over all columns, in place; how many integers moved.

    Every row of a column proposes its best step. Without H_out rows are independent and all steps are taken. With it,
    the steps of a head are taken together where that lowers the loss more than the single best of them does.
    """
    columns = q.shape[-1]
    diagonal = h_in.diagonal(dim1=-2, dim2=-1)
    own = None if h_out is None else h_out.diagonal(dim1=-2, dim2=-1)
    inner = error @ h_in  # E H_in, kept up to date column block by column block
    if inner.shape != q.shape:
        inner = inner.expand_as(q).contiguous()
    moved = 0
    for start in range(0, columns, COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, columns)
        local = h_in[:, start:stop, start:stop]
        block = inner[..., start:stop].clone()
        steps = torch.zeros_like(block)
        for i in range(start, stop):
            j = i - start
            s = scale[..., i // group]
            at = q[..., i]
            curvature = diagonal[:, i, None] if own is None else diagonal[:, i, None] * own
            g = block[..., j] if h_out is None else (h_out @ block[..., j, None])[..., 0]
            k = (-g / (s * curvature)).round_()
            k = torch.minimum(torch.maximum(k, -at), levels - at)
            d = k * s
            gain = d * (2 * g + curvature * d)
            if h_out is None:
                d = torch.where(gain < 0, d, torch.zeros_like(d))
            else:
                together = (d * (2 * g + diagonal[:, i, None] * (h_out @ d[..., None])[..., 0])).sum(-1, keepdim=True)
                best, row = gain.min(-1, keepdim=True)
                single = torch.zeros_like(d).scatter_(-1, row, d.gather(-1, row))
                d = torch.where(
                    (together < best) & (together < 0), d, torch.where(best < 0, single, torch.zeros_like(d))
                )
            steps[..., j] = d
            q[..., i] = at + (d / s).round_()
            block += d[..., None] * local[:, None, j]
        moved += int(torch.count_nonzero(steps))
        error[..., start:stop] += steps
        if stop < columns:
            inner[..., stop:] += steps @ h_in[:, start:stop, stop:]
    return moved
