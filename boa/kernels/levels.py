"""Number formats as grids: which of the integers 0 .. `levels` a weight may be.

| `levels` | format | integers |
|---|---|---|
| 2^b - 1 | integers of b bits | all of them |
| `E2M1` | floating point of four bits, doubled, 0 at 12 | 0 4 6 8 9 10 11 12 13 14 15 16 18 20 24 |

A weight of either is `scale * (integer - zero)`: that of E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) has the
zero point 12, and half the scale of its format. So only what rounds, or steps to a neighbour, knows of formats.

Steps on E2M1 are of 1 to either side of 0 up to 4, then of 2 up to 8, then of 4. Ties go to the even mantissa, as in
compressed-tensors.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

E2M1 = 24
"""The largest integer of the floating-point grid; no integer format has it."""
E2M1_ZERO = 12
"""Its zero point."""
VALUES = (0, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 24)
"""Its integers."""

# What a sum in another order may change in a search is which of two steps that are as good is taken first.
FAST = {"nnan", "ninf", "nsz", "contract", "reassoc"}
FAR = np.float32(1e37)
"""The cost of a step that is not to be taken."""

_ZERO, _ONE, _TWO, _FOUR = np.float32(E2M1_ZERO), np.float32(1), np.float32(2), np.float32(4)
_QUARTER, _HALF, _EIGHT = np.float32(0.25), np.float32(0.5), np.float32(8)


def middle_of(bits: int, *, floating: bool) -> int:
    """The zero point of a symmetric grid."""
    return E2M1_ZERO if floating else 2 ** (bits - 1)


def nearest(position: Tensor, zero: Tensor | float, levels: int) -> Tensor:
    """The integers of the grid nearest to `position + zero`; `position`, in units of the scale, may be overwritten."""
    if levels != E2M1:
        return (position + zero).round_().clamp_(0, levels)
    size = position.abs()
    step = 1 + (size > 4).to(position.dtype) + 2 * (size > 8).to(position.dtype)
    return (position / step).round_().mul_(step).clamp_(-E2M1_ZERO, E2M1_ZERO).add_(E2M1_ZERO)


def beyond(at: Tensor, step: Tensor, levels: int) -> Tensor:
    """The integers of the grid nearest to `at + step`; `step` may be overwritten."""
    if levels != E2M1:
        return step.round_().add_(at).clamp_(0, levels)
    return nearest(step.add_(at - E2M1_ZERO), 0, levels)


def steps_beside(at: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """How far the next integers of the grid above and below `at` are; past the last it is any number."""
    if levels != E2M1:
        return torch.ones_like(at), torch.ones_like(at)
    place = at - E2M1_ZERO
    return _step_above(place), _step_above(-place)


def _step_above(place: Tensor) -> Tensor:
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
def beyond_one(at, step, levels):  # type: ignore[no-untyped-def]
    """As `beyond`."""
    if levels == E2M1:
        return nearest_e2m1(at - _ZERO + step) + _ZERO
    return min(max(np.rint(step) + at, np.float32(0)), levels)


@njit(nogil=True, cache=True)
def step_above(at, levels):  # type: ignore[no-untyped-def]
    """As the first of `steps_beside`; that below is `step_above(levels - at)`, for the grid is even around its zero."""
    place = at - _ZERO
    if levels != E2M1 or (place >= -_FOUR and place < _FOUR):
        return _ONE
    return _TWO if place >= -_EIGHT and place < _EIGHT else _FOUR


@njit(nogil=True, cache=True)
def price_steps(j, s, at, own, twice_up, twice_down, up, down):  # type: ignore[no-untyped-def]
    """What steps of column j on E2M1 cost by themselves, and what they are multiplied by in the gradient."""
    levels = np.float32(E2M1)
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
