"""Columns one after another: compiled on the CPU, by Triton on CUDA, in torch operations elsewhere.

All forms do the same operations in the same order, but for sums over the rows that H_out ties together and for what one
block of columns does to those outside it. In the torch form a column is a handful of small operations, which on a GPU
take longer to start than to run.
`ROTOBOA_TRITON=0` in the environment leaves Triton out.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import compiled
from .compiled import is_compiled, spread
from .levels import beyond, is_floating, nearest, steps_beside

logger = logging.getLogger(__name__)

REST = 5  # moves that an integer rests after its own in a tabu search, at least; twice as many at most


def round_block(block: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Round the columns of a block left to right, each error spread over those that come after it.

    Args:
        block: (B, R, w) weights.
        upper: (B, w, w), the block's part of U.
        scale, zero: (B, R, w), of every weight.
        levels: the largest integer.

    Returns:
        The integers, in the dtype of `block`, and the errors divided by their pivots, (B, R, w) each.
    """
    if is_compiled(block):
        work = block.clone(memory_format=torch.contiguous_format)
        found, errors = torch.empty_like(work), torch.empty_like(work)
        rows = work.shape[0] * work.shape[1]
        spread(compiled.round_rows, rows, work.numel(), work, upper, scale, zero, found, errors, levels)
        return found, errors
    # Its kernels know the grids of integers alone.
    if not is_floating(levels) and (triton := _triton_for(block)) is not None:
        result: tuple[Tensor, Tensor] = triton.round_block(block, upper, scale, zero, levels)
        return result
    return _round_in_torch(block, upper, scale, zero, levels)


def _round_in_torch(block: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    work = block.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # whole columns are read and written
    s, z = scale.transpose(1, 2).contiguous(), zero.transpose(1, 2).contiguous()
    found, errors = torch.empty_like(work), torch.empty_like(work)
    for i in range(work.shape[1]):
        column = work[:, i]
        q = nearest(column / s[:, i], z[:, i], levels)
        found[:, i] = q
        errors[:, i] = error = (column - (q - z[:, i]) * s[:, i]) / upper[:, i, i, None]
        work[:, i + 1 :] -= upper[:, i, i + 1 :, None] * error[:, None]
    return found.transpose(1, 2), errors.transpose(1, 2)


def descend_block(
    inner: Tensor, integers: Tensor, scale: Tensor, h_in: Tensor, h_out: Tensor | None, levels: int
) -> tuple[Tensor, Tensor]:
    """One pass of coordinate descent over the columns of a block.

    Every row of a column proposes its best step. Without H_out rows are independent and all steps are taken. With it,
    the steps of a head are taken together where that lowers the loss more than the single best of them does.

    Args:
        inner: (heads, r, w), E H_in at the block's columns.
        integers: (heads, r, w), as floating-point numbers.
        scale: (heads, r, w), of every weight.
        h_in: (B, w, w), the block's part; B is 1 or heads.
        h_out: (heads, r, r) or None.
        levels: the largest integer.

    Returns:
        The integers afterwards, and the changes of the weights, (heads, r, w) each.
    """
    diagonal = h_in.diagonal(dim1=-2, dim2=-1)
    curvature = diagonal[:, None] if h_out is None else diagonal[:, None] * h_out.diagonal(dim1=-2, dim2=-1)[..., None]
    newton = -1 / (scale * curvature)
    triton = _triton_for(inner) if not is_floating(levels) else None
    if triton is not None and (h_out is None or inner.shape[1] <= triton.MOST_TIED_ROWS):
        result: tuple[Tensor, Tensor] = triton.descend_block(inner, integers, scale, newton, h_in, h_out, levels)
        return result
    return _descend_in_torch(inner, integers, scale, newton, h_in, h_out, levels)


def descend_rows(
    inner: Tensor, integers: Tensor, scale: Tensor, h_in: Tensor, h_out: Tensor | None, levels: int
) -> Tensor:
    """A sweep over all columns by the steps of `descend_block`, compiled, where `is_compiled`.

    Few integers move in a sweep (4 in 100 in the first, 1 in later ones), so E H_in follows each step by itself, not by
    a product for each block; columns are taken in blocks so that the rows of H_in they need stay in cache.

    Args:
        inner: (heads, r, c), E H_in, updated.
        integers: (heads, r, c), as floating-point numbers, updated.
        scale: (heads, r, groups).
        h_in, h_out, levels: as in `refine.sweep`.

    Returns:
        Which rows moved, (heads, r) bool.
    """
    work, found = inner.contiguous(), integers.contiguous()
    moved = torch.zeros(inner.shape[:2], dtype=torch.bool, device=inner.device)
    diagonal = h_in.diagonal(dim1=-2, dim2=-1)
    arguments = (work, found, scale, diagonal, h_in, moved, levels)
    if h_out is None:
        spread(compiled.descend_rows, work.shape[0] * work.shape[1], work.numel(), *arguments)
    else:
        spread(compiled.descend_heads, work.shape[0], work.numel() * work.shape[1], *arguments, h_out)
    for own, given in ((work, inner), (found, integers)):
        if own is not given:
            given.copy_(own)
    return moved


def search_block(gradient: Tensor, integers: Tensor, scale: Tensor, h_in: Tensor, levels: int, moves: int) -> Tensor:
    """The best integers that a tabu search of so many moves meets; see `tabu`.

    Args:
        gradient: (heads, r, w), E H_in at these columns, of rows that are independent.
        integers: (heads, r, w), as floating-point numbers.
        scale: (heads, r, w), of every weight.
        h_in: (B, w, w), the part of these columns; B is 1 or heads.
        levels: the largest integer.

    Returns:
        The integers, (heads, r, w); `integers` themselves where nothing better was met.
    """
    if is_compiled(gradient):
        found = torch.empty_like(integers, memory_format=torch.contiguous_format)
        rows = gradient.shape[0] * gradient.shape[1]
        work = gradient.numel() * max(moves, 1)
        spread(compiled.search_rows, rows, work, gradient, integers, scale, h_in, found, levels, moves, REST)
        return found
    if not is_floating(levels) and (triton := _triton_for(gradient)) is not None:
        result: Tensor = triton.search_block(gradient, integers, scale, h_in, levels, moves, REST)
        return result
    return _search_in_torch(gradient, integers, scale, h_in, levels, moves)


def _search_in_torch(
    gradient: Tensor, integers: Tensor, scale: Tensor, h_in: Tensor, levels: int, moves: int
) -> Tensor:
    g, at, best = gradient.clone(), integers.clone(), integers.clone()
    own = scale.square() * h_in.diagonal(dim1=-2, dim2=-1)[:, None]
    rows = torch.arange(len(h_in), device=g.device)[:, None]
    until = torch.zeros_like(at, dtype=torch.int32)
    loss, lowest = (g.new_zeros((*g.shape[:2], 1)) for _ in range(2))
    for move in range(moves):
        change, (above, below) = 2 * scale * g, steps_beside(at, levels)
        up, down = above * (above * own + change), below * (below * own - change)
        rests = until > move
        up, down = up.masked_fill(rests | (at >= levels), torch.inf), down.masked_fill(rests | (at <= 0), torch.inf)
        cost, place = torch.minimum(up, down).min(-1, keepdim=True)
        moves_on = cost.isfinite()
        rises = up.gather(-1, place) < down.gather(-1, place)
        rise = torch.where(rises, above.gather(-1, place), -below.gather(-1, place)) * moves_on
        at.scatter_add_(-1, place, rise)
        g += rise * scale.gather(-1, place) * h_in[rows.expand(len(g), -1) if len(h_in) > 1 else 0, place[..., 0]]
        until.scatter_(-1, place, until.gather(-1, place).masked_fill(moves_on, rest_until(move)))
        loss += cost.masked_fill(~moves_on, 0)
        better = loss < lowest
        best, lowest = torch.where(better, at, best), torch.where(better, loss, lowest)
    return best


def rest_until(move: int) -> int:
    """The first move that may change again what `move` has changed; rests of one length would go in circles."""
    return move + 1 + REST + move * 7 % (REST + 1)


def _descend_in_torch(
    inner: Tensor, integers: Tensor, scale: Tensor, newton: Tensor, h_in: Tensor, h_out: Tensor | None, levels: int
) -> tuple[Tensor, Tensor]:
    diagonal = h_in.diagonal(dim1=-2, dim2=-1)
    work, found, s, newton = (
        t.transpose(1, 2).clone(memory_format=torch.contiguous_format) for t in (inner, integers, scale, newton)
    )
    steps = torch.empty_like(work)
    for j in range(work.shape[1]):
        at = found[:, j]
        g = work[:, j] if h_out is None else (h_out @ work[:, j, :, None])[..., 0]
        # The nearest integer to the minimum of a parabola, or one on the way there, never raises it.
        goal = beyond(at, g * newton[:, j], levels)
        d = (goal - at) * s[:, j]
        if h_out is not None:
            taken = _joint_steps(d, g, h_out, diagonal[:, j, None])
            d, goal = d * taken, torch.where(taken, goal, at)
        steps[:, j], found[:, j] = d, goal
        work[:, j + 1 :] += h_in[:, j, j + 1 :, None] * d[:, None]
    return found.transpose(1, 2), steps.transpose(1, 2)


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


# -- Triton ---------------------------------------------------------------------------------------------------------


def _triton_for(tensor: Tensor) -> ModuleType | None:
    """The module of Triton kernels where it serves a tensor like this."""
    return _triton(tensor.device) if tensor.is_cuda and tensor.dtype == torch.float32 else None


@cache
def _triton(device: torch.device) -> ModuleType | None:
    """The Triton kernels, if they compile for a device and do there what the torch form does; else a warning says so.

    Triton needs a compiler or a driver that some machines lack, and finds out only when it is used.
    """
    if os.environ.get("ROTOBOA_TRITON") == "0":
        return None
    try:
        from . import triton_kernels

        if not _agrees(triton_kernels, device):
            raise RuntimeError("its integers differ from those of torch")
    except Exception as error:
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        logger.warning("Triton cannot be used on %s (%s): rounding takes several times as long", device, reason)
        return None
    return triton_kernels


def _agrees(triton: ModuleType, device: torch.device) -> bool:
    """Compare both forms on a small problem; the kernels are compiled on the way."""
    generator = torch.Generator().manual_seed(0)
    size = triton.MOST_TIED_ROWS
    x, block = (torch.randn(2, size, size, generator=generator).to(device) for _ in range(2))
    h = x @ x.transpose(1, 2) / size + torch.eye(size, device=device)
    scale, zero = torch.full_like(block, 0.4), torch.full_like(block, 4.0)
    given = (block, h.triu(), scale, zero, 7)
    (q, errors), (expected, expected_errors) = triton.round_block(*given), _round_in_torch(*given)
    same = torch.equal(q, expected) and torch.equal(errors, expected_errors)
    inner = block @ h
    newton = -1 / (scale * h.diagonal(dim1=1, dim2=2)[:, None])
    for h_out in (None, h):
        newton = newton if h_out is None else newton / h_out.diagonal(dim1=1, dim2=2)[..., None]
        arguments = (inner, q, scale, newton, h, h_out, 7)
        found, expected = triton.descend_block(*arguments)[0], _descend_in_torch(*arguments)[0]
        # Sums over tied rows are in another order, and a tie may then go another way.
        same &= torch.equal(found, expected) if h_out is None else bool((found != expected).float().mean() < 0.01)
    # Of whole numbers, so that no order of sums tells.
    h, inner = ((4 * part).round() for part in (h, inner))
    searched = (inner, q, torch.ones_like(scale), h + h.transpose(1, 2), 7, size)
    return same and torch.equal(triton.search_block(*searched, REST), _search_in_torch(*searched))
