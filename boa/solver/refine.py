"""After rounding: scales in closed form, integers by coordinate descent. The loss never rises.

With G = H_out E H_in, moving I[r, c] by k steps changes the loss by 2 k s G[r, c] + k^2 s^2 H_out[r, r] H_in[c, c].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.compiled import is_compiled
from ..kernels.dispatch import descend_block, descend_rows
from ..kernels.levels import dtype_of
from ..objective.objective import Objective
from ..stopwatch import stage
from .grid import GridSettings

COLUMN_BLOCK = 128
_ALIVE = 0.8  # rows are sorted out when no more than this part of them still changes


@dataclass
class _State:
    """Rows being refined, all (heads, r, ...): integers, scales, zero points, and a product that follows them.

    Attributes:
        inner: E H_in.
        targets: W* H_in, where a row has one group, so that (I - zero) H_in = (E + W*) H_in / scale; None with more.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    inner: Tensor
    targets: Tensor | None

    def rows(self, index: Tensor) -> _State:
        return _State(*(None if part is None else part[:, index] for part in vars(self).values()))  # type: ignore[arg-type]

    def put(self, index: Tensor, rows: _State) -> None:
        self.q[:, index], self.scale[:, index] = rows.q, rows.scale
        self.inner[:, index] = rows.inner


@stage("refinement")
def refine(
    target: Tensor,
    integers: Tensor,
    scale: Tensor,
    zero: Tensor,
    objective: Objective,
    grid: GridSettings,
    *,
    rounds: int,
    fixed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rounds` of scales and one sweep over all columns, and the scales once more.

    It ends early where nothing changes any more. Rows that are independent are left as soon as nothing of them does.
    So no row's result depends on what it is refined beside.

    Args:
        target: (heads, r, c), W*.
        integers, scale, zero: as in `rounding.Quantized`.
        objective: damped, in float64 or float32.
        grid: says which integers and scales there are.
        rounds: at most; 0: nothing is done.
        fixed: scales stay, and zero points may be any numbers.

    Returns:
        integers, scale, zero; the objective at them is at most what it was.
    """
    if not rounds:
        return integers, scale, zero
    h_in = objective.h_in.to(target.dtype)
    h_out = None if objective.h_out is None else objective.h_out.to(target.dtype)
    heads = len(target)
    independent = h_out is None and len(h_in) == 1
    if independent:
        target, integers, scale, zero = (part.flatten(0, 1)[None] for part in (target, integers, scale, zero))
    q = integers.to(target.dtype)
    targets = target @ h_in if scale.shape[-1] == 1 else None
    whole = _State(q, scale.clone(), zero, (dequantize(q, scale, zero) - target) @ h_in, targets)
    rows, alive = whole, torch.arange(q.shape[1], device=q.device)
    for _ in range(rounds):
        scaled = None if fixed else _update_scales(rows, h_in, h_out, grid)
        moved = sweep(rows.inner, rows.q, rows.scale, h_in, h_out, grid.levels)
        changes = moved if scaled is None else scaled | moved
        if not changes.any():
            break
        if independent and len(changed := changes[0].nonzero()[:, 0]) < _ALIVE * rows.q.shape[1]:
            if rows is not whole:
                whole.put(alive, rows)
            rows, alive = rows.rows(changed), alive[changed]
    if rows is not whole:
        whole.put(alive, rows)
    if not fixed:
        _update_scales(whole, h_in, h_out, grid)
    shape = (heads, -1)
    q, scale, zero = (part.flatten(0, 1).unflatten(0, shape) for part in (whole.q, whole.scale, whole.zero))
    return q.to(dtype_of(grid.levels)), scale, zero


def rescale(
    target: Tensor, integers: Tensor, scale: Tensor, zero: Tensor, objective: Objective, grid: GridSettings
) -> Tensor:
    """The best scales of fixed integers, in closed form; arguments as of `refine`. The objective does not rise."""
    h_in = objective.h_in.to(target.dtype)
    h_out = None if objective.h_out is None else objective.h_out.to(target.dtype)
    q = integers.to(target.dtype)
    state = _State(q, scale.clone(), zero, (dequantize(q, scale, zero) - target) @ h_in, None)
    _update_scales(state, h_in, h_out, grid)
    return state.scale


def dequantize(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The weights (heads, r, c) of integers given as floating-point numbers, in their dtype."""
    parts = q.unflatten(-1, (scale.shape[-1], -1))
    return ((parts - zero[..., None]) * scale[..., None]).flatten(-2)


def _update_scales(state: _State, h_in: Tensor, h_out: Tensor | None, grid: GridSettings) -> Tensor:
    """The best scales for fixed integers, group after group, in place; which rows' changed, (heads, r) bool.

    With V = I - zero (r, g columns), the loss is quadratic in the change d of a group's scales (r,):
    d^T M d + 2 b^T d, M = H_out * (V H_in V^T) elementwise, b_r = (G V^T)[r, r]. Stored scales are rounded, so a row (a
    head, where H_out ties its rows) keeps its scale where rounding it would not lower the loss.
    """
    q, scale, inner = state.q, state.scale, state.inner
    groups = scale.shape[-1]
    size = q.shape[-1] // groups
    changed = torch.zeros(scale.shape[:2], dtype=torch.bool, device=scale.device)
    for g in range(groups):
        span = slice(g * size, (g + 1) * size)
        v = q[..., span] - state.zero[..., g, None]
        vh = v @ h_in[:, span] if state.targets is None else (inner + state.targets).div_(scale)
        gradient = inner[..., span] if h_out is None else h_out @ inner[..., span]
        b = (gradient * v).sum(-1)
        if h_out is None:
            m = (vh[..., span] * v).sum(-1)
            delta = torch.where(m > 0, -b / m, torch.zeros_like(b))
        else:
            m = (h_out * (vh[..., span] @ v.transpose(-1, -2))).double()
            ridge = 1e-9 * m.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(1e-30)
            m = m + torch.diag_embed(ridge.expand(m.shape[:-1]))
            delta = -torch.linalg.solve(m, b.double()[..., None])[..., 0].to(b.dtype)
            m = m.to(b.dtype)
        old = scale[..., g]
        new = grid.snap((old + delta).clamp_min(0.05 * old))
        delta = new - old
        if h_out is None:
            gain = delta * (2 * b + m * delta)
            delta = torch.where(gain < 0, delta, torch.zeros_like(delta))
        else:
            gain = (delta * (2 * b + (m @ delta[..., None])[..., 0])).sum(-1, keepdim=True)
            delta = torch.where(gain < 0, delta, torch.zeros_like(delta))
        scale[..., g] = torch.where(delta != 0, new, old)
        changed |= delta != 0
        inner.addcmul_(delta[..., None], vh)
    return changed


def sweep(
    inner: Tensor,
    q: Tensor,
    scale: Tensor,
    h_in: Tensor,
    h_out: Tensor | None,
    top: int,
) -> Tensor:
    """One pass of coordinate descent over all columns; see `kernels.descend_block` for the steps that are taken.

    Args:
        inner: (heads, r, c), E H_in, updated.
        q: (heads, r, c), the integers, updated.
        scale: (heads, r, groups).
        h_in: (B, c, c); B is 1 or heads.
        h_out: (heads, r, r) or None.
        top: the largest integer.

    Returns:
        Which rows moved, (heads, r) bool.
    """
    if is_compiled(inner):
        return descend_rows(inner, q, scale, h_in, h_out, top)
    columns = q.shape[-1]
    size = columns // scale.shape[-1]
    moved = torch.zeros(q.shape[:2], dtype=torch.bool, device=q.device)
    for start in range(0, columns, COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, columns)
        groups = torch.arange(start, stop, device=q.device).div(size, rounding_mode="floor")
        q[..., start:stop], d = descend_block(
            inner[..., start:stop], q[..., start:stop], scale[..., groups], h_in[:, start:stop, start:stop], h_out, top
        )
        moved |= (d != 0).any(-1)
        inner.baddbmm_(d, h_in[:, start:stop].expand(len(inner), -1, -1))  # with no product of its own in memory
    return moved
