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

    Args:
        error, q: (heads, r, c), the weight error and the integers, both updated.
        scale: (heads, r, c / group).
        h_in: (B, c, c); B is 1 or heads.
        h_out: (heads, r, r) or None.
    """
    columns = q.shape[-1]
    diagonal = h_in.diagonal(dim1=-2, dim2=-1)
    own = 1.0 if h_out is None else h_out.diagonal(dim1=-2, dim2=-1)[:, None]
    inner = (error @ h_in).transpose(1, 2).contiguous()  # E H_in, columns first: the loop below works on whole columns
    integers = q.transpose(1, 2).contiguous()
    by_column = scale.transpose(1, 2).contiguous()
    moved = 0
    for start in range(0, columns, COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, columns)
        local = h_in[:, start:stop, start:stop]
        block = inner[:, start:stop]
        groups = torch.arange(start, stop, device=q.device).div(group, rounding_mode="floor")
        s = by_column[:, groups]  # (heads, columns of the block, r)
        curvature = diagonal[:, start:stop, None] * own
        newton = -1 / (s * curvature)
        steps = torch.empty_like(block)
        for j in range(stop - start):
            at = integers[:, start + j]
            g = block[:, j] if h_out is None else (h_out @ block[:, j, :, None])[..., 0]
            # The nearest integer to the minimum of a parabola, or one on the way there, never raises it.
            goal = (g * newton[:, j]).round_().add_(at).clamp_(0, levels)
            d = (goal - at) * s[:, j]
            if h_out is not None:
                taken = _joint_steps(d, g, h_out, diagonal[:, start + j, None])
                d, goal = d * taken, torch.where(taken, goal, at)
            steps[:, j] = d
            integers[:, start + j] = goal
            if start + j + 1 < stop:
                block[:, j + 1 :] += local[:, j, j + 1 :, None] * d[:, None]
        moved += int(torch.count_nonzero(steps))
        error[..., start:stop] += steps.transpose(1, 2)
        if stop < columns:
            inner[:, stop:] += h_in[:, stop:, start:stop] @ steps
    q.copy_(integers.transpose(1, 2))
    return moved


def _joint_steps(d: Tensor, g: Tensor, h_out: Tensor, curvature: Tensor) -> Tensor:
    """Which steps of one column to take, (heads, r) bool: all of a head, its best, or none.

    Args:
        d: (heads, r), the proposed changes of the weights.
        g: (heads, r), half the gradient there.
        curvature: (B, 1), H_in[c, c].
    """
    together = (d * (2 * g + curvature * (h_out @ d[..., None])[..., 0])).sum(-1, keepdim=True)
    gain = d * (2 * g + curvature * h_out.diagonal(dim1=-2, dim2=-1) * d)
    best, row = gain.min(-1, keepdim=True)
    single = torch.zeros_like(d, dtype=torch.bool).scatter_(-1, row, best < 0)
    return torch.where((together < best) & (together < 0), d != 0, single)
