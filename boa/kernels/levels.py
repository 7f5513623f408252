"""Number formats as grids: which of the integers 0 .. `levels` a weight may be.

| `levels` | format | integers |
|---|---|---|
| 2^b - 1 | integers of b bits | all of them |
| `E2M1` | floating point of four bits, doubled, 0 at 12 | 0 4 6 8 9 10 11 12 13 14 15 16 18 20 24 |
| `E4M3` | that of eight bits, times 512, 0 in the middle | 253 of them, to 448 * 512 on either side |

A weight of each is `scale * (integer - zero)`: that of E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) has the
zero point 12, and half the scale of its format. So only what rounds, or steps to a neighbour, knows of formats.

Steps are of 1 to either side of 0, and double with each power of two: on E2M1 of 1 up to 4, then of 2 up to 8, then of
4; on E4M3 of 1 up to 16, then of 2 up to 32, and so on. Ties go to the even mantissa, as in compressed-tensors.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

E2M1 = 24
"""The largest integer of the floating-point grid; no integer format has it."""
E2M1_ZERO = 12
"""Its zero point."""
E4M3 = 2 * 448 * 512
"""The same of eight bits; the zero point is the middle of this one too."""
UNITS = {"nvfp4": 2, "mxfp4": 2, "fp8": 512}
"""Integers to the number 1 of each format of floating point."""
VALUES = (0, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 24)
"""The integers of E2M1."""

# What a sum in another order may change in a search is which of two steps that are as good is taken first.
FAST = {"nnan", "ninf", "nsz", "contract", "reassoc"}
FAR = np.float32(1e37)
"""The cost of a step that is not to be taken."""

_ZERO, _ONE, _TWO, _FOUR = np.float32(E2M1_ZERO), np.float32(1), np.float32(2), np.float32(4)
_SIXTEEN, _E2M1, _TOP = np.float32(16), np.float32(E2M1), np.float32(E4M3 // 2)
_QUARTER, _HALF, _EIGHT = np.float32(0.25), np.float32(0.5), np.float32(8)


def is_floating(levels: int) -> bool:
    """Whether the grid is one of floating point."""
    return levels in (E2M1, E4M3)


def middle_of(levels: int) -> int:
    """The zero point of a symmetric grid."""
    return levels // 2 if is_floating(levels) else (levels + 1) // 2


def dtype_of(levels: int) -> torch.dtype:
    """What holds the integers of a grid."""
    return torch.int32 if levels == E4M3 else torch.uint8


def nearest(position: Tensor, zero: Tensor | float, levels: int) -> Tensor:
    """The integers of the grid nearest to `position + zero`; `position`, in units of the scale, may be overwritten."""
    if not is_floating(levels):
        return (position + zero).round_().clamp_(0, levels)
    middle = levels // 2
    if levels == E4M3:
        unit = UNITS["fp8"]
        found = (position / unit).clamp_(-middle / unit, middle / unit).to(torch.float8_e4m3fn)
        return found.to(position.dtype).mul_(unit).add_(middle)
    size = position.abs()
    step = 1 + (size > 4).to(position.dtype) + 2 * (size > 8).to(position.dtype)
    return (position / step).round_().mul_(step).clamp_(-middle, middle).add_(middle)


def beyond(at: Tensor, step: Tensor, levels: int) -> Tensor:
    """The integers of the grid nearest to `at + step`; `step` may be overwritten."""
    if not is_floating(levels):
        return step.round_().add_(at).clamp_(0, levels)
    return nearest(step.add_(at - levels // 2), 0, levels)


def steps_beside(at: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """How far the next integers of the grid above and below `at` are; past the last it is any number."""
    if not is_floating(levels):
        return torch.ones_like(at), torch.ones_like(at)
    place = at - levels // 2
    return _step_above(place, levels), _step_above(-place, levels)


def _step_above(place: Tensor, levels: int) -> Tensor:
    if levels == E4M3:
        fraction, exponent = torch.frexp(place)  # of a fraction from 1/2 on, and of 1/2 for a power of two
        smaller = (fraction == -0.5).to(exponent.dtype)
        return torch.ldexp(torch.ones_like(place), (exponent - 4 - smaller).clamp_min_(0))
    near, far = ((place < -bound) | (place >= bound) for bound in (4, 8))
    return 1 + near.to(place.dtype) + 2 * far.to(place.dtype)


# The same of one number in float32, compiled.


@njit(nogil=True, cache=True)
def nearest_e2m1(x):  # type: ignore[no-untyped-def]
    """The integer of E2M1 nearest to x, with 0 at 0."""
    size = abs(x)
    step, part = (_FOUR, _QUARTER) if size > _EIGHT else (_TWO, _HALF) if size > _FOUR else (_ONE, _ONE)
    return min(max(np.rint(x * part) * step, -_ZERO), _ZERO)


@njit(nogil=True, cache=True)
def nearest_float(x, levels):  # type: ignore[no-untyped-def]
    """The integer of the grid of floating point nearest to x, with 0 at 0."""
    if levels == _E2M1:
        return nearest_e2m1(x)
    size, step = abs(x), _ONE
    if size > _SIXTEEN:
        step = np.float32(math.ldexp(1.0, math.frexp(size)[1] - 4))
    return min(max(np.rint(x / step) * step, -_TOP), _TOP)


@njit(nogil=True, cache=True)
def is_float(levels):  # type: ignore[no-untyped-def]
    """As `is_floating`."""
    return levels == _E2M1 or levels == _TOP + _TOP


@njit(nogil=True, cache=True)
def beyond_one(at, step, levels):  # type: ignore[no-untyped-def]
    """As `beyond`."""
    if is_float(levels):
        zero = np.float32(levels) * _HALF
        return nearest_float(at - zero + step, levels) + zero
    return min(max(np.rint(step) + at, np.float32(0)), levels)


@njit(nogil=True, cache=True)
def step_above(at, levels):  # type: ignore[no-untyped-def]
    """As the first of `steps_beside`; that below is `step_above(levels - at)`, for the grid is even around its zero."""
    if not is_float(levels):
        return _ONE
    place = at - np.float32(levels) * _HALF
    if levels == _E2M1:
        if place >= -_FOUR and place < _FOUR:
            return _ONE
        return _TWO if place >= -_EIGHT and place < _EIGHT else _FOUR
    if place >= -_SIXTEEN and place < _SIXTEEN:
        return _ONE
    fraction, exponent = math.frexp(place)
    return np.float32(math.ldexp(1.0, exponent - (5 if fraction == -0.5 else 4)))


@njit(nogil=True, cache=True)
def price_steps(j, s, at, own, twice_up, twice_down, up, down, levels):  # type: ignore[no-untyped-def]
    """What steps of column j cost by themselves, and what they are multiplied by in the gradient."""
    above, below = step_above(at[j], levels), step_above(levels - at[j], levels)
    twice_up[j], twice_down[j] = (s + s) * above, (s + s) * below
    up[j] = own[j] * (above * above) if at[j] < levels else FAR
    down[j] = own[j] * (below * below) if at[j] > 0 else FAR


@njit(nogil=True, cache=True, fastmath=FAST)
def costs_apart(g, twice_up, twice_down, up, down, v):  # type: ignore[no-untyped-def]
    """As `compiled._costs`, where steps up and down differ."""
    least = FAR
    for j in range(len(g)):
        v[j] = min(up[j] + twice_up[j] * g[j], down[j] - twice_down[j] * g[j])
    for j in range(len(g)):
        least = min(least, v[j])
    return least
