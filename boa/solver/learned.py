"""Learned rounding on an objective: AdaRound (arXiv 2004.10568) on a layer's, aespa (2402.08958) on attention's.

An integer is `base + h(v)`, h the rectified sigmoid of a variable v, so that the objective becomes smooth. Adam lowers
it while a regulariser, 1 - |2 h - 1|^beta, whose exponent falls, drives every h to 0 or 1. The objective is quadratic:
with E = s (base + h - zero) - W* its gradient by h is 2 s H_out E H_in, element by element, and no autograd is needed.

The start is a rounded solution. What is next to each of its integers is the one on the side where the objective falls,
so both are on the grid and the start is among what can be learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..objective.objective import Objective
from ..stopwatch import stage
from .grid import GridSettings
from .refine import refine, rescale

STRETCH = 1.2  # zeta - gamma, of zeta 1.1 and gamma -0.1
MARGIN = 0.1  # -gamma
BETA = (20.0, 2.0)
WARM = 0.3  # of all iterations, before the regulariser sets in
SHARE = 0.2  # of the best step of each integer by itself, which is where the variables start
_CHUNK = {"cpu": 1 << 16}  # weights learned at a time: what a processor's cache holds
_CHUNK_ELSEWHERE = 1 << 26


@dataclass(frozen=True)
class Learning:
    """How rounding is learned.

    Attributes:
        iterations: steps of Adam.
        rate: its learning rate.
        regulariser: the weight of the regulariser, against an objective in units of what one step of an integer costs
            in it: s^2 H_out[r, r] H_in[c, c], on average over a head, or over a row where rows are independent.
    """

    iterations: int = 2000
    rate: float = 0.015
    regulariser: float = 1.5

    def beta(self, iteration: int) -> float | None:
        """The regulariser's exponent, falling evenly from 20 to 2; None in the warm start, which has none."""
        warm = int(WARM * self.iterations)
        if iteration < warm:
            return None
        done = (iteration - warm) / max(1, self.iterations - 1 - warm)
        return BETA[0] + (BETA[1] - BETA[0]) * done


def rectified(v: Tensor, out: Tensor | None = None) -> Tensor:
    """h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1)."""
    return torch.sigmoid(v, out=out).mul_(STRETCH).sub_(MARGIN).clamp_(0, 1)


def variables(h: Tensor) -> Tensor:
    """The v of which `rectified` makes h; an h of 0 or 1, which no gradient reaches, is taken as one close to it."""
    return ((h.clamp(0.01, 0.99) + MARGIN) / STRETCH).logit()


def slope_(h: Tensor) -> Tensor:
    """dh/dv from h, in its place: 1.2 sigmoid (1 - sigmoid), and 0 where h is cut off."""
    cut = (h - 0.5).abs_() >= 0.5
    # With sigmoid = (h + 0.1) / 1.2 it is (h + 0.1) (1.1 - h) / 1.2, a parabola around 1/2.
    return h.sub_(0.5).square_().sub_((0.5 + MARGIN) ** 2).div_(-STRETCH).masked_fill_(cut, 0)


def penalty_slope(h: Tensor, beta: float) -> Tensor:
    """Of what AdaRound adds to the objective, 1 - |2 h - 1|^beta, by h: -2 beta |2 h - 1|^(beta - 1) sign(2 h - 1)."""
    around = h.mul(2).sub_(1)
    return around.abs().pow_(beta - 1).copysign_(around).mul_(-2 * beta)


def beside(position: Tensor, levels: int) -> Tensor:
    """The lower of the two integers in 0 .. levels that `position`, in units of the grid, lies between."""
    return position.floor().clamp_(0, levels - 1)


def side_and_variables(q: Tensor, step: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Where learned rounding starts: `SHARE` of the way from the integers `q` to their best steps, each by itself.

    Args:
        q: integers as floating-point numbers.
        step: in units of the grid; less than half where the start cannot be improved by one integer.
        levels: the largest integer.

    Returns:
        The lower of the two integers that each weight has, and the variables v.
    """
    position = q + SHARE * step.clamp(-0.5, 0.5)
    base = beside(position, levels)
    return base, variables(position - base)


class Relaxed:
    """The objective as a function of v, in units of one step's cost, and its gradient in closed form.

    Args:
        target: (heads, r, c), W*.
        integers, scale, zero: as in `rounding.Quantized`, the start.
        h_in: (B, c, c), h_out: (heads, r, r) or None, in the dtype of the target.
        levels: the largest integer.

    Attributes:
        base: (heads, r, c), the lower of the two integers that each weight has.
        v: (heads, r, c), where the variables start.
    """

    def __init__(
        self,
        target: Tensor,
        integers: Tensor,
        scale: Tensor,
        zero: Tensor,
        h_in: Tensor,
        h_out: Tensor | None,
        levels: int,
    ) -> None:
        size = target.shape[-1] // scale.shape[-1]
        self.scale, self.zero = (part.repeat_interleave(size, -1) for part in (scale, zero))
        self.h_in, self.h_out = h_in, h_out
        self._error, self._inner = (torch.empty_like(target) for _ in range(2))
        q = integers.to(target.dtype)
        self._offset = (q - self.zero) * self.scale - target
        curvature = h_in.diagonal(dim1=-2, dim2=-1)[:, None]
        if h_out is not None:
            curvature = curvature * h_out.diagonal(dim1=-2, dim2=-1)[..., None]
        curvature = (self.scale.square() * curvature).clamp_min_(torch.finfo(target.dtype).tiny)
        step = -self.scale * self._weighed(self._offset) / curvature
        self.base, self.v = side_and_variables(q, step, levels)
        self._offset += (self.base - q) * self.scale
        unit = curvature.mean(-1 if h_out is None else (-2, -1), keepdim=True)
        self._factor = 2 * self.scale / unit

    def _weighed(self, error: Tensor) -> Tensor:
        inner = torch.matmul(error, self.h_in, out=self._inner)
        return inner if self.h_out is None else self.h_out @ inner

    def gradient(self, h: Tensor, beta: float | None, regulariser: float) -> Tensor:
        """By v, of the objective and the regulariser, at h = `rectified(v)`, which is used up: (heads, r, c)."""
        torch.mul(h, self.scale, out=self._error).add_(self._offset)
        found = self._weighed(self._error).mul_(self._factor)
        if beta is not None:
            found.add_(penalty_slope(h, beta), alpha=regulariser)
        return found.mul_(slope_(h))


@stage("refinement")
def improve(
    target: Tensor,
    integers: Tensor,
    scale: Tensor,
    zero: Tensor,
    objective: Objective,
    grid: GridSettings,
    learning: Learning,
    *,
    rounds: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`learn`, then the scales in closed form, then `refine` by so many rounds; arguments as of those.

    Returns:
        integers, scale, zero; the caller keeps the start where it was better.
    """
    found = learn(target, integers, scale, zero, objective, grid, learning)
    scale = rescale(target, found, scale, zero, objective, grid)
    return refine(target, found, scale, zero, objective, grid, rounds=rounds)


def learn(
    target: Tensor,
    integers: Tensor,
    scale: Tensor,
    zero: Tensor,
    objective: Objective,
    grid: GridSettings,
    learning: Learning,
) -> Tensor:
    """The integers that learned rounding ends at, uint8; its objective may be above that of the start.

    Args:
        target: (heads, r, c), W*.
        integers, scale, zero: as in `rounding.Quantized`, the start; scales and zero points stay.
        objective: damped.
        grid: of integers: those of floating point are not as far apart from each other.
        learning: iterations, learning rate, regulariser.
    """
    h_in = objective.h_in.to(target.dtype)
    h_out = None if objective.h_out is None else objective.h_out.to(target.dtype)
    shape = target.shape
    limit = _CHUNK.get(target.device.type, _CHUNK_ELSEWHERE)
    start = (target, integers, scale, zero)
    found = []
    if h_out is None and len(h_in) == 1:  # every row is a problem of its own
        rows = (part.flatten(0, 1).split(max(1, limit // shape[-1])) for part in start)
        for t, q, s, z in zip(*rows, strict=True):
            found.append(_learn(Relaxed(t[None], q[None], s[None], z[None], h_in, None, grid.levels), learning)[0])
    else:
        step = max(1, limit // (shape[1] * shape[2]))
        for i in range(0, shape[0], step):
            t, q, s, z = (part[i : i + step] for part in start)
            inner = h_in if len(h_in) == 1 else h_in[i : i + step]
            outer = None if h_out is None else h_out[i : i + step]
            found.append(_learn(Relaxed(t, q, s, z, inner, outer, grid.levels), learning))
    return torch.cat(found).view(shape).to(torch.uint8)


def _learn(relaxed: Relaxed, learning: Learning) -> Tensor:
    """(heads, r, c), in the dtype of the target."""
    v = relaxed.v
    optimizer = torch.optim.Adam([v], lr=learning.rate, fused=True)
    h = torch.empty_like(v)
    for iteration in range(learning.iterations):
        v.grad = relaxed.gradient(rectified(v, h), learning.beta(iteration), learning.regulariser)
        optimizer.step()
    return relaxed.base + (rectified(v) >= 0.5)
