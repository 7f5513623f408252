"""Tabu search over the integers of rows: out of the local minimum in which coordinate descent ends.

At each move the one step of one integer by one is taken that lowers the objective most, or raises it least, and that
integer then rests for some moves, so that the search leaves a minimum and does not fall back into it (Glover, Tabu
Search I, ORSA Journal on Computing 1, 1989). The best integers on the way are kept. Of a row only H_in is looked at:
with g = (H_out E H_in)[r] / H_out[r, r], a step d of column c changes the loss by 2 d g[c] + d^2 H_in[c, c], in units
of H_out[r, r], and g by d H_in[c].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.dispatch import search_block
from ..kernels.levels import dtype_of
from ..objective.objective import Objective
from ..stopwatch import stage
from .grid import GridSettings
from .refine import dequantize, refine

WIDTH = 4096
"""Columns that are searched together: what a row has of them stays in cache, or in a GPU's registers."""


@stage("search", whole=True)
def improve(
    target: Tensor,
    integers: Tensor,
    scale: Tensor,
    zero: Tensor,
    objective: Objective,
    grid: GridSettings,
    *,
    moves: float,
    rounds: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Search, then `refine` by so many rounds; arguments as of `refine`.

    Args:
        moves: of a row, for each of its columns.

    Returns:
        integers, scale, zero; the caller keeps the start where it was better.
    """
    h_in = objective.h_in.to(target.dtype)
    h_out = None if objective.h_out is None else objective.h_out.to(target.dtype)
    q = integers.to(target.dtype)
    search((dequantize(q, scale, zero) - target) @ h_in, q, scale, h_in, h_out, grid.levels, moves)
    return refine(target, q.to(dtype_of(grid.levels)), scale, zero, objective, grid, rounds=rounds)


def search(inner: Tensor, q: Tensor, scale: Tensor, h_in: Tensor, h_out: Tensor | None, top: int, moves: float) -> None:
    """Search every row once, `WIDTH` columns at a time; rows that H_out ties together one after another.

    Args:
        inner: (heads, r, c), E H_in, updated.
        q: (heads, r, c), the integers as floating-point numbers, updated.
        scale: (heads, r, groups).
        h_in: (B, c, c); B is 1 or heads.
        h_out: (heads, r, r) or None.
        top: the largest integer.
        moves: of a row, for each of its columns.
    """
    rows, columns = q.shape[1:]
    size = columns // scale.shape[-1]
    for start in range(0, columns, WIDTH):
        span = slice(start, min(start + WIDTH, columns))
        groups = torch.arange(span.start, span.stop, device=q.device).div(size, rounding_mode="floor")
        steps, count = scale[..., groups], round(moves * (span.stop - start))
        within = h_in[:, span, span].contiguous()  # once, not for each row
        for row in [slice(None)] if h_out is None else [slice(r, r + 1) for r in range(rows)]:
            gradient = inner[:, row, span]
            if h_out is not None:
                gradient = h_out[:, row] @ inner[..., span] / h_out[:, row, row]
            found = search_block(gradient, q[:, row, span], steps[:, row], within, top, count)
            inner[:, row] += ((found - q[:, row, span]) * steps[:, row]) @ h_in[:, span]
            q[:, row, span] = found
