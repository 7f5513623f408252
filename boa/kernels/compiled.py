"""Loops over columns, compiled for the CPU: what `kernels` runs on float32 there, each over some rows or heads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .levels import FAR, FAST, beyond_one, costs_apart, is_float, nearest_float, price_steps, step_above

COLUMNS = 128  # of a block: their rows of H_in stay in cache while all rows of the weight pass
TOGETHER = 8  # rows that are rounded side by side: one alone waits for its divisions
AHEAD = 32  # columns that are looked at together for one that moves
_SERIAL = 1 << 15  # weights below which more threads cost more than they save


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
def round_rows(work, upper, scale, zero, found, errors, levels, start, stop):  # type: ignore[no-untyped-def]
    """`kernels.round_block` of rows `start` to `stop` of all heads."""
    _, rows, width = work.shape
    index, floating = start, is_float(levels)
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
                if floating:
                    nearest = nearest_float(block[k, i] / s[k, i], levels) + z[k, i]
                else:
                    nearest = min(max(np.rint(block[k, i] / s[k, i] + z[k, i]), np.float32(0)), levels)
                error = (block[k, i] - (nearest - z[k, i]) * s[k, i]) / pivot
                q[k, i], e[k, i] = nearest, error
                rest = block[k, i + 1 :]
                for j in range(len(after)):
                    rest[j] -= after[j] * error
        index += end - r


@njit(nogil=True, cache=True)
def descend_rows(inner, integers, scale, diagonal, h_in, moved, levels, start, stop):  # type: ignore[no-untyped-def]
    """`kernels.descend_rows` of independent rows `start` to `stop` of all heads."""
    _, rows, columns = inner.shape
    size, zero, one = columns // scale.shape[2], np.float32(0), np.float32(-1)
    newton, floating = np.empty(COLUMNS, inner.dtype), is_float(levels)
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
                if floating:
                    for j in range(len(ahead)):
                        moves |= np.int32(beyond_one(places[j], ahead[j] * factors[j], levels) != places[j])
                else:
                    for j in range(len(ahead)):  # which is compiled to vectors: no index is below 0
                        goal = min(max(np.rint(ahead[j] * factors[j]) + places[j], zero), levels)
                        moves |= np.int32(goal != places[j])
                if moves:  # of these at least the first is taken
                    moved[b, r] = True
                    for j in range(first, last):
                        goal = beyond_one(at[j], row[j] * newton[j - left], levels)
                        if goal != at[j]:
                            d = (goal - at[j]) * s[j // size]
                            at[j] = goal
                            column = h[j]
                            for k in range(columns):
                                row[k] += column[k] * d
                first = last


@njit(nogil=True, cache=True)
def descend_heads(inner, integers, scale, diagonal, h_in, moved, levels, h_out, start, stop):  # type: ignore[no-untyped-def]
    """`kernels.descend_rows` of heads `start` to `stop`, whose rows H_out ties together."""
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
                goal[r] = beyond_one(at, gradient[r] * newton, levels)
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


_LANES = 64  # columns that are looked at together


@njit(nogil=True, cache=True)
def search_rows(gradient, integers, scale, h_in, found, levels, moves, rest, start, stop):  # type: ignore[no-untyped-def]
    """`kernels.search_block` of rows `start` to `stop` of all heads; `rest` is the shortest."""
    _, rows, columns = gradient.shape
    padded = -(-columns // _LANES) * _LANES
    size, count, wait = columns // scale.shape[2], int(moves), int(rest)
    g, twice, v = np.zeros(padded, np.float32), np.zeros(padded, np.float32), np.empty(padded, np.float32)
    up, down = np.full(padded, FAR), np.full(padded, FAR)
    own, at, least = np.empty(columns, np.float32), np.empty(columns, np.float32), np.empty(_LANES, np.float32)
    log, barred, until = np.empty(count, np.int32), np.empty(2 * wait + 1, np.int64), np.empty(2 * wait + 1, np.int64)
    even = not is_float(levels)  # all steps are of 1
    twice_down = np.zeros(0 if even else padded, np.float32)
    for index in range(start, stop):
        b, r = index // rows, index % rows
        h = h_in[b % h_in.shape[0]]
        for j in range(columns):
            s = scale[b, r, j // size]
            g[j], twice[j], at[j], own[j] = gradient[b, r, j], s + s, integers[b, r, j], s * s * h[j, j]
            if even:
                up[j], down[j] = own[j] if at[j] < levels else FAR, own[j] if at[j] > 0 else FAR
            else:
                price_steps(j, s, at, own, twice, twice_down, up, down, levels)
        loss = lowest = np.float32(0)
        waiting = best = 0
        for move in range(count):
            i = 0
            while i < waiting:
                if until[i] > move:
                    i += 1
                    continue
                k, waiting = barred[i], waiting - 1
                barred[i], until[i] = barred[waiting], until[waiting]
                if even:
                    up[k], down[k] = own[k] if at[k] < levels else FAR, own[k] if at[k] > 0 else FAR
                else:
                    price_steps(k, scale[b, r, k // size], at, own, twice, twice_down, up, down, levels)
            cost = _costs(g, twice, up, down, v, least) if even else costs_apart(g, twice, twice_down, up, down, v)
            k = _place(v, cost)
            if k >= columns or cost >= FAR / 2:  # nothing can move
                log[move] = 0
                continue
            two = twice[k] if even else twice_down[k]
            rises = up[k] + twice[k] * g[k] < down[k] - two * g[k]
            step = np.float32(0.5) * twice[k] if rises else np.float32(-0.5) * two
            at[k] += step_above(at[k], levels) if rises else -step_above(levels - at[k], levels)
            _follow(g, h[k], step)
            loss += cost
            log[move] = k + 1 if rises else -k - 1
            up[k] = down[k] = FAR
            barred[waiting], until[waiting] = k, move + 1 + wait + move * 7 % (wait + 1)
            waiting += 1
            if loss < lowest:
                lowest, best = loss, move + 1
        result = found[b, r]
        result[:] = integers[b, r]
        for move in range(best):
            k = log[move]
            if k > 0:
                result[k - 1] += step_above(result[k - 1], levels)
            elif k < 0:
                result[-k - 1] -= step_above(levels - result[-k - 1], levels)


@njit(nogil=True, cache=True, fastmath=FAST)
def _costs(g, twice, up, down, v, least):  # type: ignore[no-untyped-def]
    """The cost of each column's better step in `v`; the least of all."""
    for j in range(_LANES):
        least[j] = FAR
    for i in range(0, len(g), _LANES):
        part, two, rise, fall, cost = (
            g[i : i + _LANES], twice[i : i + _LANES], up[i : i + _LANES], down[i : i + _LANES], v[i : i + _LANES],
        )  # fmt: skip
        for j in range(_LANES):
            change = two[j] * part[j]
            cost[j] = min(rise[j] + change, fall[j] - change)
        for j in range(_LANES):
            least[j] = min(least[j], cost[j])
    half = _LANES // 2
    while half:
        for j in range(half):
            least[j] = min(least[j], least[j + half])
        half //= 2
    return least[0]


@njit(nogil=True, cache=True)
def _place(v, cost):  # type: ignore[no-untyped-def]
    """The first column of this cost."""
    for i in range(0, len(v), _LANES):
        part, here = v[i : i + _LANES], np.int32(0)
        for j in range(_LANES):
            here |= np.int32(part[j] == cost)
        if here:
            for j in range(_LANES):
                if part[j] == cost:
                    return i + j
    return len(v)


@njit(nogil=True, cache=True, fastmath=FAST)
def _follow(g, column, step):  # type: ignore[no-untyped-def]
    for j in range(len(column)):
        g[j] += column[j] * step
