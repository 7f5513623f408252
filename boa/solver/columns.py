"""One row block of error-compensated rounding: columns one after another, in lazy blocks (GPTQ, arXiv 2210.17323)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.dispatch import round_block
from ..kernels.levels import dtype_of
from ..stopwatch import stage
from .grid import GridSettings, search

COLUMN_BLOCK = 128


@stage("columns")
def round_columns(
    weight: Tensor,
    h_in: Tensor,
    upper: Tensor,
    order: Tensor | None,
    group: int,
    settings: GridSettings,
    grid: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns left to right (or in `order`), each rounding error spread over the columns that come after.

    Args:
        weight: (B, R, c) targets; not modified.
        h_in: (B, c, c) damped Hessian, in the order of the weight's columns.
        upper: (B, c, c), U^T U = H_in^-1, in `order` where one is given.
        order: (B, c) permutation of the columns, or None. With an order every grid is chosen beforehand; without one,
            a group's grid is chosen when its first column is reached, from the columns as compensated so far.
        group: columns that share a scale.
        grid: scale and zero (B, R, c / group) to round to; None searches them.

    Returns:
        integers (B, R, c) in `dtype_of` the grid, scale and zero (B, R, c / group).
    """
    batch, rows, columns = weight.shape
    groups = columns // group
    ahead = grid is None and order is None and groups > 1
    if grid is not None:
        scale, zero = grid
    elif ahead:
        scale, zero = (weight.new_empty(batch, rows, groups) for _ in range(2))
    else:
        parts = weight.unflatten(-1, (groups, group)).transpose(1, 2).flatten(0, 1)
        blocks = h_in.unflatten(2, (groups, group)).unflatten(1, (groups, group)).diagonal(dim1=1, dim2=3)
        grids = search(parts, blocks.permute(0, 3, 1, 2).flatten(0, 1), settings)
        scale, zero = (part.unflatten(0, (batch, groups)).transpose(1, 2).contiguous() for part in grids)
    work = weight.clone() if order is None else weight.gather(2, order[:, None].expand_as(weight))
    group_of = torch.arange(columns, device=weight.device).div(group, rounding_mode="floor").expand(batch, -1)
    if order is not None:
        group_of = group_of.gather(1, order)
    found = torch.empty_like(work)
    width = group if ahead else COLUMN_BLOCK
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        if ahead:
            g, span = start // group, slice(start, stop)
            scale[..., g], zero[..., g] = search(work[..., span], h_in[:, span, span], settings)
        pick = group_of[:, None, start:stop].expand(-1, rows, -1)
        found[..., start:stop], errors = round_block(
            work[..., start:stop], upper[:, start:stop, start:stop], scale.gather(2, pick), zero.gather(2, pick),
            settings.levels,
        )  # fmt: skip
        if stop < columns:
            work[..., stop:] -= errors @ upper[:, start:stop, stop:]
    if order is not None:
        found = torch.empty_like(found).scatter_(2, order[:, None].expand_as(found), found)
    return found.to(dtype_of(settings.levels)), scale, zero


def descending(h_in: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, c): the channels of H_in (B, c, c), those with the largest diagonal first."""
    return h_in.diagonal(dim1=-2, dim2=-1).to(dtype).argsort(dim=-1, descending=True, stable=True)


def permute(h: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of h (B, c, c) in the order (B, c) of each."""
    batch = torch.arange(len(h), device=h.device)[:, None, None]
    return h[batch, order[:, :, None], order[:, None]]
