"""Columns one after another: compiled on the CPU, by Triton on CUDA, in torch operations elsewhere.

All forms do the same operations in the same order, but for sums over the rows that H_out ties together and for what one
block of columns does to those outside it. In the torch form a column is a handful of small operations, which on a GPU
take longer to start than to run.
`ROTOBOA_TRITON=0` in the environment leaves Triton out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

logger = logging.getLogger(__name__)

COLUMNS = 128  # of a block: their rows of H_in stay in cache while all rows of the weight pass
TOGETHER = 8  # rows that are rounded side by side: one alone waits for its divisions
AHEAD = 32  # columns that are looked at together for one that moves
_SERIAL = 1 << 15  # weights below which more threads cost more than they save


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
        spread(_round_rows, rows, work.numel(), work, upper, scale, zero, found, errors, levels)
        return found, errors
    if (triton := _triton_for(block)) is not None:
        result: tuple[Tensor, Tensor] = triton.round_block(block, upper, scale, zero, levels)
        return result
    return _round_in_torch(block, upper, scale, zero, levels)


def _round_in_torch(block: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    work = block.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # whole columns are read and written
    s, z = scale.transpose(1, 2).contiguous(), zero.transpose(1, 2).contiguous()
    found, errors = torch.empty_like(work), torch.empty_like(work)
    for i in range(work.shape[1]):
        column = work[:, i]
        q = (column / s[:, i] + z[:, i]).round_().clamp_(0, levels)
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
    triton = _triton_for(inner)
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
        spread(_descend_rows, work.shape[0] * work.shape[1], work.numel(), *arguments)
    else:
        spread(_descend_heads, work.shape[0], work.numel() * work.shape[1], *arguments, h_out)
    for own, given in ((work, inner), (found, integers)):
        if own is not given:
            given.copy_(own)
    return moved


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
        goal = (g * newton[:, j]).round_().add_(at).clamp_(0, levels)
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
    return same


# -- compiled -------------------------------------------------------------------------------------------------------


def is_compiled(tensor: Tensor) -> bool:
    """Whether the compiled form computes on it."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="rotoboa")


def spread(kernel: Callable[..., None], count: int, work: int, *arguments: Any) -> None:
    """Run `kernel(*arguments, start, stop)` over 0 .. count, on as many threads as torch uses."""
    given = [a.detach().contiguous().numpy() if isinstance(a, Tensor) else np.float32(a) for a in arguments]
    threads = min(torch.get_num_threads(), count, 1 + work // _SERIAL)
    bounds = [count * i // threads for i in range(threads + 1)]
    others = [_pool().submit(kernel, *given, *span) for span in pairwise(bounds[1:])]
    kernel(*given, bounds[0], bounds[1])
    for other in others:
        other.result()


@njit(nogil=True, cache=True)
def _round_rows(work, upper, scale, zero, found, errors, levels, start, stop):  # type: ignore[no-untyped-def]
    _, rows, width = work.shape
    index = start
    while index < stop:
        b, r = index // rows, index % rows
        end = min(r + TOGETHER, r + stop - index, rows)
        block, s, z, q, e, u = (
            work[b, r:end],
            scale[b, r:end],
            zero[b, r:end],
            found[b, r:end],
            errors[b, r:end],
            upper[b],
        )
        for i in range(width):
            after, pivot = u[i, i + 1 :], u[i, i]
            for k in range(len(block)):  # each waits for its own division only
                nearest = min(max(np.rint(block[k, i] / s[k, i] + z[k, i]), np.float32(0)), levels)
                error = (block[k, i] - (nearest - z[k, i]) * s[k, i]) / pivot
                q[k, i], e[k, i] = nearest, error
                rest = block[k, i + 1 :]
                for j in range(len(after)):
                    rest[j] -= after[j] * error
        index += end - r


@njit(nogil=True, cache=True)
def _descend_rows(inner, integers, scale, diagonal, h_in, moved, levels, start, stop):  # type: ignore[no-untyped-def]
    _, rows, columns = inner.shape
    size, zero, one = columns // scale.shape[2], np.float32(0), np.float32(-1)
    newton = np.empty(COLUMNS, inner.dtype)
    for left in range(0, columns, COLUMNS):
        right = min(left + COLUMNS, columns)
        for index in range(start, stop):
            b, r = index // rows, index % rows
            row, h, at, s = inner[b, r], h_in[b % h_in.shape[0]], integers[b, r], scale[b, r]
            curvature = diagonal[b % h_in.shape[0]]
            done = left
            while done < right:
                until = min((done // size + 1) * size, right)
                step, parts, factors = s[done // size], curvature[done:until], newton[done - left : until - left]
                for j in range(len(parts)):
                    factors[j] = one / (step * parts[j])
                done = until
            first = left
            while first < right:
                last = min(first + AHEAD, right)
                ahead, places, factors = row[first:last], at[first:last], newton[first - left : last - left]
                moves = np.int32(0)
                for j in range(len(ahead)):  # which is compiled to vectors: no index is below 0
                    goal = min(max(np.rint(ahead[j] * factors[j]) + places[j], zero), levels)
                    moves |= np.int32(goal != places[j])
                if moves:  # of these at least the first is taken
                    moved[b, r] = True
                    for j in range(first, last):
                        goal = min(max(np.rint(row[j] * newton[j - left]) + at[j], zero), levels)
                        if goal != at[j]:
                            d = (goal - at[j]) * s[j // size]
                            at[j] = goal
                            column = h[j]
                            for k in range(columns):
                                row[k] += column[k] * d
                first = last


@njit(nogil=True, cache=True)
def _descend_heads(inner, integers, scale, diagonal, h_in, moved, levels, h_out, start, stop):  # type: ignore[no-untyped-def]
    _, rows, columns = inner.shape
    size = columns // scale.shape[2]
    # An integer would make these sums float64.
    zero, one, two = np.float32(0), np.float32(-1), np.float32(2)
    gradient, follow = np.empty(rows, inner.dtype), np.empty(rows, inner.dtype)
    d, goal = np.empty(rows, inner.dtype), np.empty(rows, inner.dtype)
    for b in range(start, stop):
        h, out, curvature = h_in[b % h_in.shape[0]], h_out[b], diagonal[b % h_in.shape[0]]
        for j in range(columns):
            g = j // size
            gradient[:] = zero
            for i in range(rows):
                x = inner[b, i, j]
                for r in range(rows):
                    gradient[r] += out[i, r] * x
            moves = 0
            for r in range(rows):
                at, s = integers[b, r, j], scale[b, r, g]
                newton = one / (s * (curvature[j] * out[r, r]))
                goal[r] = min(max(np.rint(gradient[r] * newton) + at, zero), levels)
                d[r] = (goal[r] - at) * s
                moves += d[r] != 0
            if moves == 0:
                continue
            follow[:] = zero
            for i in range(rows):
                if d[i] != 0:
                    for r in range(rows):
                        follow[r] += out[i, r] * d[i]
            together, best, single = zero, np.float32(np.inf), 0
            for r in range(rows):
                together += d[r] * (two * gradient[r] + curvature[j] * follow[r])
                gain = d[r] * (two * gradient[r] + curvature[j] * out[r, r] * d[r])
                if gain < best:
                    best, single = gain, r
            everyone = together < best and together < 0
            column = h[j]
            for r in range(rows):
                if d[r] != 0 and (everyone or (r == single and best < 0)):
                    integers[b, r, j], moved[b, r] = goal[r], True
                    row, step = inner[b, r], d[r]
                    for k in range(columns):
                        row[k] += column[k] * step
