"""Z-Fold: a second scale, one an input channel, by alternating least squares on the objective.

A weight is `s_i zeta_j (I_ij - z_i)` (Jeon et al., EMNLP 2023; in aespa before the learned rounding). zeta is shared by
all projections that read the same input, and ends in the layer before them: see `rotation.channels`. With D =
diag(zeta), finding Q for W under H_in is finding Q' for W D^-1 under D H_in D, with Q = Q' D: so integers and s come
from the solver of every other weight, and zeta from least squares. With A = s (I - z), both steps are quadratic:

    zeta:  M m = b,  M = sum_h (A^T H_out A) * H_in,  b = sum_h diag(A^T H_out W H_in)        (* elementwise)
    s:     per row, or per head where H_out ties its rows, as in `refine`

Neither can raise the loss while integers are kept. Rounding again with the new zeta can, so the best of all rounds is
taken, and zeta = 1 where that is no better than plain rounding without a second scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..objective.objective import Objective
from ..precision import exact_products
from .grid import snap
from .rounding import quantize
from .rounding_settings import Settings

ROUNDS = 4  # of rounding again
STEPS = 3  # of least squares in a round
MOST = 2.0  # factor by which a step may change a scale
RIDGE = 1e-6  # of the mean diagonal: what holds a scale where no integer says anything about it


@dataclass(frozen=True)
class Term:
    """A projection, or several that share H_in, whose error counts relative to that of a zero weight.

    Attributes:
        weight: (heads, r, c).
        objective: damped.
        settings: of its rounding; refinement and further starts are left out here.
    """

    weight: Tensor
    objective: Objective
    settings: Settings

    def scaled(self, zeta: Tensor) -> Term:
        """The same problem for inputs that are multiplied by `zeta` (c,)."""
        z = zeta.to(self.weight)
        h_in = self.objective.h_in * zeta.to(self.objective.h_in) * zeta.to(self.objective.h_in)[:, None]
        return replace(self, weight=self.weight / z, objective=Objective(h_in, self.objective.h_out))

    def loss(self, levels: Tensor) -> Tensor:
        """tr(H_out E H_in E^T) of E = levels - W over that of W, scalar."""
        whole = self.objective.loss(self.weight).sum().clamp_min(torch.finfo(self.weight.dtype).tiny)
        return self.objective.loss(levels - self.weight).sum() / whole


@dataclass(frozen=True)
class ChannelScales:
    """What was found: `zeta` (parameters,), and the relative loss of a plain rounding with it and without it."""

    zeta: Tensor
    loss: float
    without: float

    def summary(self) -> dict[str, float]:
        """Both losses, and the range of zeta, whose geometric mean is 1."""
        least, most = (float(part) for part in self.zeta.aminmax())
        return {"loss": self.loss, "without": self.without, "least": least, "most": most}


Grid = tuple[Tensor, Tensor]  # scale and zero, (heads, r, groups)


@dataclass
class _Rounded:
    """What plain rounding makes of the terms when `zeta` is taken out of them."""

    zeta: Tensor
    terms: list[Term]
    levels: list[Tensor]
    grids: list[Grid]
    loss: float


@exact_products()
def channel_scales(terms: Sequence[Term], tie: Tensor | None = None) -> ChannelScales:
    """The scales of the input channels that `terms` share.

    Integers are made anew `ROUNDS` times, on the grids that least squares leave. The first grids are searched, at the
    better of two starts: 1, and the size of the columns.

    Args:
        terms: projections that read the same input; their relative losses add up.
        tie: (c,), which parameter each channel takes; None: each its own.
    """
    quick: dict[str, Any] = {"method": "boa", "alpha": 0.0, "refine": 1, "starts": 1, "tabu": 0.0}
    columns = terms[0].weight.shape[-1]
    tie = torch.arange(columns) if tie is None else tie
    tie = tie.to(terms[0].weight.device)

    def rounded(zeta: Tensor, grids: Sequence[Grid | None]) -> _Rounded:
        scaled = [term.scaled(zeta[tie]) for term in terms]
        found = [
            quantize(t.weight, t.objective, t.settings.but(**quick), grid)
            for t, grid in zip(scaled, grids, strict=True)
        ]
        levels = [result.dequantize().to(term.weight) for result, term in zip(found, scaled, strict=True)]
        used = [(result.scale, result.zero) for result in found]
        return _Rounded(zeta, scaled, levels, used, float(sum(map(Term.loss, scaled, levels))))

    ones = terms[0].weight.new_ones(int(tie.max()) + 1)
    searched: list[Grid | None] = [None] * len(terms)
    plain, other = rounded(ones, searched), rounded(column_scales(terms, tie), searched)
    best = now = min(plain, other, key=lambda found: found.loss)
    without = plain.loss
    del plain, other
    for _ in range(ROUNDS):
        before = list(now.levels)
        factor = alternate(now.terms, now.levels, tie)
        zeta = now.zeta * factor
        mean = zeta.log().mean().exp()
        grids = [
            (snap(scale * mean * _row_factors(new, old * factor[tie], scale.shape[-1])), zero)
            for (scale, zero), new, old in zip(now.grids, now.levels, before, strict=True)
        ]
        now = rounded(zeta / mean, grids)
        best = min(best, now, key=lambda found: found.loss)
    zeta, loss = best.zeta, rounded(best.zeta, searched).loss  # on searched grids, as it was without
    return ChannelScales(zeta, loss, without) if loss < without else ChannelScales(ones, without, without)


def _row_factors(new: Tensor, old: Tensor, groups: int) -> Tensor:
    """By what the scales of rows have changed, (heads, r, groups), where `new` is `old` but for that."""
    new, old = (part.unflatten(-1, (groups, -1)) for part in (new, old))
    factors = (new * old).sum(-1) / old.square().sum(-1).clamp_min(torch.finfo(old.dtype).tiny)
    return factors.clamp_min(0.05)


def column_scales(terms: Sequence[Term], tie: Tensor) -> Tensor:
    """The root mean square of each channel's weights, rows counted alike, with a geometric mean of 1: (parameters,)."""
    total = torch.zeros_like(terms[0].weight[0, 0])
    for term in terms:
        squares = term.weight.flatten(0, 1).square()
        total += (squares / squares.mean(-1, keepdim=True).clamp_min(1e-30)).sum(0)
    size = int(tie.max()) + 1
    found = total.new_zeros(size).index_add_(0, tie, total) / torch.bincount(tie, minlength=size)
    found = found.clamp_min(1e-6 * found.mean()).sqrt()
    return found / found.log().mean().exp()


def alternate(terms: Sequence[Term], levels: list[Tensor], tie: Tensor) -> Tensor:
    """Least squares in turn for zeta and for the scales of rows, integers kept; the loss never rises.

    Args:
        terms: as above.
        levels: A of each, (heads, r, c); changed, to hold the new scales of rows and channels.
        tie: (c,), which parameter each channel takes.

    Returns:
        What zeta is multiplied by, (parameters,).
    """
    zeta = torch.ones(int(tie.max()) + 1, dtype=levels[0].dtype, device=tie.device)
    for _ in range(STEPS):
        step = zeta_step(terms, levels, tie)
        zeta = zeta * step
        for i, term in enumerate(terms):
            levels[i] = row_step(term, levels[i] * step[tie])
    return zeta


def zeta_step(terms: Sequence[Term], levels: Sequence[Tensor], tie: Tensor) -> Tensor:
    """The factors (parameters,) on channels of `levels` that minimise the terms' loss, each within `MOST`.

    Where one would go beyond, it stops there, or, if that raises the loss, the whole step is shortened.
    """
    size = int(tie.max()) + 1
    m = torch.zeros(size, size, dtype=torch.float64, device=tie.device)
    g = torch.zeros(size, dtype=torch.float64, device=tie.device)
    for term, a in zip(terms, levels, strict=True):
        part, slope = _normal(term, a)
        g.index_add_(0, tie, slope)
        m.index_add_(1, tie, part.new_zeros(size, len(tie)).index_add_(0, tie, part))
    mean = m.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    ridge = torch.diag_embed(RIDGE * mean.expand(size))
    delta = -torch.linalg.solve(m + ridge, g[:, None])[:, 0]
    least, most = 1 / MOST - 1, MOST - 1
    cut = delta.clamp(least, most)
    if 2 * (g @ cut) + cut @ (m @ cut) > 0:  # no way down any more: all of the step is shortened, which is one
        cut = delta / torch.maximum(delta / most, delta / least).max().clamp_min(1)
    return (1 + cut).to(levels[0].dtype)


def _normal(term: Term, a: Tensor) -> tuple[Tensor, Tensor]:
    """M (c, c) and half the slope at 1 (c,) of one term, relative to its loss at a zero weight, in float64."""
    h_in, h_out = (None if h is None else h.to(a.dtype) for h in (term.objective.h_in, term.objective.h_out))
    assert h_in is not None
    left = a if h_out is None else h_out @ a
    if len(h_in) == 1:
        m = (a.flatten(0, 1).T @ left.flatten(0, 1)).mul_(h_in[0])
    else:
        m = sum((one.T @ other).mul_(h) for one, other, h in zip(a, left, h_in, strict=True))
    slope = (left * ((a - term.weight) @ h_in)).sum((0, 1))
    whole = term.objective.loss(term.weight).sum().double().clamp_min(torch.finfo(torch.float32).tiny)
    return m.double() / whole, slope.double() / whole


def row_step(term: Term, a: Tensor) -> Tensor:
    """`a` (heads, r, c) with the scale of every row, group after group, at its least squares for fixed integers."""
    h_in, h_out = (None if h is None else h.to(a.dtype) for h in (term.objective.h_in, term.objective.h_out))
    assert h_in is not None
    a = a.clone()
    group = term.settings.group_size or a.shape[-1]
    for start in range(0, a.shape[-1], group):
        span = slice(start, start + group)
        part = a[..., span]
        gradient = (a - term.weight) @ h_in[..., span]
        if h_out is None:
            m, b = ((part @ h_in[:, span, span]) * part).sum(-1), (gradient * part).sum(-1)
            delta = torch.where(m > 0, -b / m, torch.zeros_like(b))
        else:
            b = ((h_out @ gradient) * part).sum(-1).double()
            full = (h_out * (part @ h_in[:, span, span] @ part.transpose(-1, -2))).double()
            ridge = RIDGE * full.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(1e-30)
            full = full + torch.diag_embed(ridge.expand(full.shape[:-1]))
            delta = -torch.linalg.solve(full, b[..., None])[..., 0].to(a.dtype)
        a[..., span] = part * (1 + delta)[..., None]
    return a
