# mypy: disallow-untyped-defs=False
"""`kernels.round_block`, `descend_block` and `search_block` on a GPU: a program takes some rows through all columns.

All do what the torch form does, in its order and to the last bit: IEEE division, ties to the even integer, and no
product fused with a sum. Sums over the rows that H_out ties together are the exception: their order is another.

A tile of rows stays in registers. Its current column is drawn out by a sum that meets one entry and zeros, which is
exact; what belongs to the next column is loaded before the current one is worked on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4  # of a program, which is one warp: rows are summed without a barrier
MOST_TIED_ROWS = 128  # of a head: a program holds all of H_out in registers, and has no more
_OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}


def round_block(block: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """As `kernels.round_block`, float32 on CUDA."""
    block, upper = _rows_in_order(block), _rows_in_order(upper)
    scale, zero = scale.contiguous(), zero.contiguous()
    batch, rows, width = block.shape
    found, errors = (torch.empty(block.shape, dtype=block.dtype, device=block.device) for _ in range(2))
    columns = triton.next_power_of_2(width)
    tile = max(1, min(ROWS, ROWS * 128 // columns))  # columns of a large group with a grid of its own are many
    with torch.cuda.device_of(block):
        _round[(triton.cdiv(rows, tile), batch)](
            block, upper, scale, zero, found, errors, rows, width, float(levels), *block.stride()[:2],
            *upper.stride()[:2], tile=tile, span=columns, num_warps=min(max(columns // 512, 1), 16), **_OPTIONS,
        )  # fmt: skip
    return found, errors


def descend_block(
    inner: Tensor, integers: Tensor, scale: Tensor, newton: Tensor, h_in: Tensor, h_out: Tensor | None, levels: int
) -> tuple[Tensor, Tensor]:
    """As `kernels.descend_block`, float32 on CUDA.

    Args:
        newton: (heads, r, w), -1 / (scale * H_in[c, c] * H_out[r, r]).
        h_out: (heads, r, r) with r at most `MOST_TIED_ROWS`, or None.
    """
    inner, integers, h_in = _rows_in_order(inner), _rows_in_order(integers), _rows_in_order(h_in)
    scale, newton = scale.contiguous(), newton.contiguous()
    heads, rows, width = inner.shape
    found, steps = (torch.empty(inner.shape, dtype=inner.dtype, device=inner.device) for _ in range(2))
    given = (inner, integers, scale, newton, h_in, found, steps, rows, width, float(levels), len(h_in))
    strides = (*inner.stride()[:2], *integers.stride()[:2], *h_in.stride()[:2])
    columns = triton.next_power_of_2(width)
    with torch.cuda.device_of(inner):
        if h_out is None:
            _descend[(triton.cdiv(rows, ROWS), heads)](
                *given, *strides, tile=ROWS, span=columns, num_warps=1, **_OPTIONS
            )
        else:
            tied = triton.next_power_of_2(rows)
            warps = min(max(tied * max(tied, columns) // 1024, 1), 16)  # 32 entries of a matrix for each thread
            _descend_tied[(heads,)](
                *given, h_out.contiguous(), *strides, tile=tied, span=columns, num_warps=warps,
                **_OPTIONS,
            )  # fmt: skip
    return found, steps


def search_block(
    gradient: Tensor, integers: Tensor, scale: Tensor, h_in: Tensor, levels: int, moves: int, rest: int
) -> Tensor:
    """As `kernels.search_block`, float32 on CUDA; a row is held in registers: `tabu.WIDTH` columns at most."""
    gradient, integers, scale, h_in = (part.contiguous() for part in (gradient, integers, scale, h_in))
    found = torch.empty_like(integers)
    heads, rows, width = gradient.shape
    span = triton.next_power_of_2(width)
    with torch.cuda.device_of(gradient):
        _search[(rows, heads)](
            gradient, integers, scale, h_in, found, rows, width, float(levels), moves, rest, len(h_in), span=span,
            num_warps=min(max(span // 512, 1), 16), **_OPTIONS,
        )  # fmt: skip
    return found


def _rows_in_order(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@triton.jit
def _nearest(x):
    """The nearest integer, ties to even, of |x| < 2^22: 1.5 * 2^23 leaves the sum no bit behind the point."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _round(
    block, upper, scale, zero, found, errors, rows, width, levels, block_b, block_r, upper_b, upper_r,
    tile: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * tile + tl.arange(0, tile)[:, None]
    column = tl.arange(0, span)[None, :]
    alive = row < rows
    inside = alive & (column < width)
    own = (b * rows + row) * width
    upper += b * upper_b
    work = tl.load(block + b * block_b + row.to(tl.int64) * block_r + column, mask=inside, other=0.0)
    integers = tl.full([tile, span], 0.0, tl.float32)
    s, z = tl.load(scale + own, mask=alive, other=1.0), tl.load(zero + own, mask=alive, other=0.0)
    u, pivot = tl.load(upper + column, mask=(column > 0) & (column < width), other=0.0), tl.load(upper)
    for i in range(width):
        k = min(i + 1, width - 1)
        next_s = tl.load(scale + own + k, mask=alive, other=1.0)
        next_z = tl.load(zero + own + k, mask=alive, other=0.0)
        next_u = tl.load(upper + k * upper_r + column, mask=(column > k) & (column < width), other=0.0)
        next_pivot = tl.load(upper + k * upper_r + k)

        here = column == i
        x = tl.sum(tl.where(here, work, 0.0), axis=1, keep_dims=True)
        q = _nearest(tl.minimum(tl.maximum(tl.div_rn(x, s) + z, 0.0), levels))
        error = tl.div_rn(x - (q - z) * s, pivot)
        integers = tl.where(here, q, integers)
        work = tl.where(here, error, work - u * error)  # a column that is done holds its error
        s, z, u, pivot = next_s, next_z, next_u, next_pivot
    tl.store(found + own + column, integers, mask=inside)
    tl.store(errors + own + column, work, mask=inside)


@triton.jit
def _descend(
    inner, integers, scale, newton, h_in, found, steps, rows, width, levels, batch, inner_b, inner_r, integers_b,
    integers_r, h_b, h_r, tile: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * tile + tl.arange(0, tile)[:, None]
    column = tl.arange(0, span)[None, :]
    alive = row < rows
    inside = alive & (column < width)
    own = (b * rows + row) * width
    h_in += b % batch * h_b
    integers += b * integers_b + row.to(tl.int64) * integers_r
    work = tl.load(inner + b * inner_b + row.to(tl.int64) * inner_r + column, mask=inside, other=0.0)
    goals = tl.full([tile, span], 0.0, tl.float32)
    at, s = tl.load(integers, mask=alive, other=0.0), tl.load(scale + own, mask=alive, other=0.0)
    n = tl.load(newton + own, mask=alive, other=0.0)
    h = tl.load(h_in + column, mask=(column > 0) & (column < width), other=0.0)
    for j in range(width):
        k = min(j + 1, width - 1)
        next_at = tl.load(integers + k, mask=alive, other=0.0)
        next_s = tl.load(scale + own + k, mask=alive, other=0.0)
        next_n = tl.load(newton + own + k, mask=alive, other=0.0)
        next_h = tl.load(h_in + k * h_r + column, mask=(column > k) & (column < width), other=0.0)

        here = column == j
        g = tl.sum(tl.where(here, work, 0.0), axis=1, keep_dims=True)
        # Steps beyond all levels end at the same bound as one of all levels.
        goal = _nearest(tl.minimum(tl.maximum(g * n, -levels), levels)) + at
        goal = tl.minimum(tl.maximum(goal, 0.0), levels)
        d = (goal - at) * s
        goals = tl.where(here, goal, goals)
        work = tl.where(here, d, work + h * d)  # a column that is done holds its step
        at, s, n, h = next_at, next_s, next_n, next_h
    tl.store(found + own + column, goals, mask=inside)
    tl.store(steps + own + column, work, mask=inside)


@triton.jit
def _descend_tied(
    inner, integers, scale, newton, h_in, found, steps, rows, width, levels, batch, h_out, inner_b, inner_r,
    integers_b, integers_r, h_b, h_r, tile: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, tile), tl.arange(0, span)
    alive = row < rows
    own = (b * rows + row) * width
    h_in += b % batch * h_b
    h_out += b * rows * rows
    integers += b * integers_b + row.to(tl.int64) * integers_r
    at_inner = inner + b * inner_b + row[:, None].to(tl.int64) * inner_r + column[None, :]
    work = tl.load(at_inner, mask=alive[:, None] & (column < width)[None, :], other=0.0)
    out = tl.load(h_out + row[:, None] * rows + row[None, :], mask=alive[:, None] & alive[None, :], other=0.0)
    diagonal = tl.load(h_out + row * (rows + 1), mask=alive, other=0.0)
    for j in range(width):
        at = tl.load(integers + j, mask=alive, other=0.0)
        s = tl.load(scale + own + j, mask=alive, other=0.0)
        n = tl.load(newton + own + j, mask=alive, other=0.0)
        h = tl.load(h_in + j * h_r + column, mask=(column > j) & (column < width), other=0.0)
        curvature = tl.load(h_in + j * h_r + j)

        x = tl.sum(tl.where((column == j)[None, :], work, 0.0), axis=1)
        g = tl.sum(out * x[None, :], axis=1)
        goal = _nearest(tl.minimum(tl.maximum(g * n, -levels), levels)) + at
        goal = tl.minimum(tl.maximum(goal, 0.0), levels)
        d = (goal - at) * s
        # All steps of a head, its best, or none: `kernels._joint_steps`.
        follow = tl.sum(out * d[None, :], axis=1)
        together = tl.sum(d * (2.0 * g + curvature * follow), axis=0, keep_dims=True)
        gain = d * (2.0 * g + curvature * diagonal * d)
        best = tl.min(gain, axis=0, keep_dims=True)
        first = tl.min(tl.where(gain == best, row, tile), axis=0, keep_dims=True)
        everyone = (together < best) & (together < 0.0)
        taken = tl.where(everyone, d != 0.0, (row == first) & (best < 0.0))
        d = tl.where(taken, d, 0.0)
        tl.store(found + own + j, tl.where(taken, goal, at), mask=alive)
        tl.store(steps + own + j, d, mask=alive)
        work += h[None, :] * d[:, None]


@triton.jit
def _search(
    gradient, integers, scale, h_in, found, rows, width, levels, moves, rest, batch, span: tl.constexpr
):  # fmt: skip
    b, row, column = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.arange(0, span)
    own, inside, far = (b * rows + row) * width, column < width, 1e37
    h_in += b % batch * width * width
    g = tl.load(gradient + own + column, mask=inside, other=0.0)
    at = tl.load(integers + own + column, mask=inside, other=0.0)
    s = tl.load(scale + own + column, mask=inside, other=0.0)
    curvature = s * s * tl.load(h_in + column.to(tl.int64) * (width + 1), mask=inside, other=0.0)
    best, until = at, tl.zeros([span], tl.int32)
    loss, lowest = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
    for move in range(moves):
        change = 2.0 * s * g
        free = inside & (until <= move)
        up = tl.where(free & (at < levels), curvature + change, far)
        down = tl.where(free & (at > 0.0), curvature - change, far)
        cost = tl.minimum(up, down)
        least = tl.min(cost, axis=0, keep_dims=True)
        # The first column of this cost, and in the last bit whether it rises; one behind them all where none can move.
        key = tl.min(tl.where(cost == least, 2 * column + (up < down).to(tl.int32), 2 * span), axis=0, keep_dims=True)
        key = tl.where(least < 0.5 * far, key, 2 * span)
        place, rise = key // 2, 2.0 * (key % 2) - 1.0
        here = column == place
        step = rise * tl.load(scale + own + place, mask=place < width, other=0.0)
        row_of = h_in + place.to(tl.int64) * width
        g += step * tl.load(row_of + column, mask=inside & (place < width), other=0.0)
        at += tl.where(here, rise, 0.0)
        until = tl.where(here, move + 1 + rest + move * 7 % (rest + 1), until)
        loss += tl.where(least < 0.5 * far, least, 0.0)
        best = tl.where(loss < lowest, at, best)
        lowest = tl.minimum(lowest, loss)
    tl.store(found + own + column, best, mask=inside)
