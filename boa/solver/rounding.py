"""Error-compensated rounding: RTN, GPTQ, BoA and TurboBoA are settings of this one solver.

Rows are taken `rows` at a time in every head at once, columns left to right in lazy blocks (GPTQ, arXiv 2210.17323;
BoA, arXiv 2406.13474; TurboBoA, arXiv 2602.04929). AdaRound and aespa go on from its result: `learned`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.squares import round_to
from ..objective.objective import Objective, inverse_factor
from ..scheme import TWO_LEVELS
from ..stopwatch import stage
from . import tabu
from .columns import descending, permute, round_columns
from .grid import search, snap
from .learned import improve
from .refine import refine
from .rounding_settings import LAYERWISE, Settings
from .two_levels import rounded, two_levels


@dataclass
class Quantized:
    """Integers (heads, r, c) in 0 .. 2^b - 1, scale and zero (heads, r, groups); the weight is scale * (I - zero).

    `loss` is the objective at the result, summed over heads; None for RTN, which has none. `damping` is the part of
    the mean diagonal that its Hessians needed. Floating point is integers too, see `kernels.levels`; `global_scale` is
    that of NVFP4.
    """

    integers: Tensor
    scale: Tensor
    zero: Tensor
    loss: float | None = None
    damping: float = 0.0
    global_scale: float = 1.0

    def dequantize(self) -> Tensor:
        """(heads, r, c), float32."""
        group = self.integers.shape[-1] // self.scale.shape[-1]
        parts = self.integers.float().unflatten(-1, (-1, group))
        return ((parts - self.zero[..., None]) * self.scale[..., None]).flatten(-2)


_Problem = tuple[Quantized, Objective, Tensor]


@stage("losses")
def quantize(
    weight: Tensor, objective: Objective | None, settings: Settings, grid: tuple[Tensor, Tensor] | None = None
) -> Quantized:
    """Quantize one projection.

    Args:
        weight: (heads, r, c) float32; a projection without heads is one head.
        objective: what to minimise; not read by rtn, which may pass None. Where its diagonal of H_in is zero the
            channel is dead, and its weights become 0 (but for rtn).
        grid: scale and zero (heads, r, groups) to start from; None searches them, and so does rtn.

    Raises:
        ValueError: the group size does not divide the columns, or the objective is not finite or stays indefinite.
    """
    heads, _, columns = weight.shape
    group = settings.group_size or columns
    if columns % group:
        raise ValueError(f"group size {group} does not divide {columns} columns")
    if settings.method == "rtn" or objective is None:
        grids = weight.reshape(1, -1, group)
        scale, zero = search(grids, None, settings.grid_settings)
        integers = round_to(grids, scale[..., None], zero[..., None], settings.grid_settings.levels)
        shape = (heads, -1, columns // group)
        plain = Quantized(integers.to(torch.uint8).view_as(weight), scale.view(shape), zero.view(shape))
        return _on_two_levels(plain, weight, None, settings) if settings.format in TWO_LEVELS else plain

    if settings.method in LAYERWISE:
        objective = replace(objective, h_out=None)
    # A channel that the quantized stream never saw active says nothing, and must not widen its row's grid. What its
    # weights put out in the other stream is for the others to make up for: they are in the target, and then go.
    dead = objective.dead[:, None]
    objective = objective.damped(settings.damping)
    target = objective.target(weight, settings.alpha).masked_fill(dead, 0)
    best = _round_and_refine(target, objective, settings, grid)
    if settings.starts > 1:
        best = _restart(best, target, objective, settings)
    if settings.tabu:
        start = (target, best.integers, best.scale, best.zero)
        searched = tabu.improve(*start, objective, settings.grid_settings, moves=settings.tabu, rounds=settings.refine)
        best = _best((best, objective, target), (Quantized(*searched), objective, target))
    if settings.method in ("adaround", "aespa"):
        start = (target, best.integers, best.scale, best.zero)
        found = improve(*start, objective, settings.grid_settings, settings.learning, rounds=settings.refine)
        best = _best((best, objective, target), (Quantized(*found), objective, target))
    if settings.format in TWO_LEVELS:
        best = _on_two_levels(best, target, objective, settings)
    best.loss = float(objective.loss(best.dequantize() - target).sum())
    best.damping = objective.damping
    return best


def _round_and_refine(
    target: Tensor, objective: Objective, settings: Settings, grid: tuple[Tensor, Tensor] | None = None
) -> Quantized:
    rounded = _compensate(target, objective, settings, grid)
    if not settings.refine:
        return rounded
    start = (target, rounded.integers, rounded.scale, rounded.zero)
    return Quantized(*refine(*start, objective, settings.grid_settings, rounds=settings.refine))


def _on_two_levels(found: Quantized, target: Tensor, objective: Objective | None, settings: Settings) -> Quantized:
    """With scales of scales, and the integers again on that grid: rounded anew, or moved, whichever is better."""
    scale, zero = two_levels(found.integers, found.scale, found.zero, objective, settings.format, settings.bits)
    levels = settings.grid_settings.levels
    if objective is None:
        return Quantized(rounded(target, scale, zero, levels), scale, zero)
    results = []
    for integers in (found.integers, _compensate(target, objective, settings, (scale, zero)).integers):
        start = (target, integers, scale, zero)
        moved = refine(*start, objective, settings.grid_settings, rounds=max(1, settings.refine), fixed=True)
        results.append((Quantized(*moved), objective, target))
    return _best(*results)


@stage("starts", whole=True)
def _restart(first: Quantized, target: Tensor, objective: Objective, settings: Settings) -> Quantized:
    """Round again from grids a little wider and narrower than the refined one; every row keeps its best.

    Coordinate descent ends in a local minimum, and another start ends in another. Rows that H_out ties together are
    kept or replaced by the head. All starts are one problem with as many more heads.
    """
    count, heads = settings.starts - 1, len(target)
    factors = torch.tensor([_factor(i) for i in range(count)], dtype=target.dtype, device=target.device)
    factors = factors.repeat_interleave(heads)[:, None, None]
    middle, grid = (2**settings.bits - 1) / 2, settings.grid_settings
    if grid.format == "int":
        scale = snap(first.scale.repeat(count, 1, 1) * factors)
    else:  # whose storable scales are farther apart
        steps = torch.tensor([(i // 2 + 1) * (-1) ** i for i in range(count)], device=target.device)
        scale = grid.beside(first.scale.repeat(count, 1, 1), steps.repeat_interleave(heads)[:, None, None])
    zero = first.zero.repeat(count, 1, 1)
    if not grid.symmetric:
        zero = ((zero - middle) / factors + middle).round_().clamp_(0, 2**settings.bits - 1)
    many = Objective(
        objective.h_in if len(objective.h_in) == 1 else objective.h_in.repeat(count, 1, 1),
        None if objective.h_out is None else objective.h_out.repeat(count, 1, 1),
        memo=objective.memo if len(objective.h_in) == 1 else None,
    )
    targets = target.repeat(count, 1, 1)
    others = _round_and_refine(targets, many, settings, (scale, zero))
    return _best((first, objective, target), (others, many, targets))


def _best(one: _Problem, more: _Problem) -> Quantized:
    """Of one result and several others, stacked as more heads, the best of each row; of each head under H_out."""
    (first, _, target), (others, _, _) = one, more
    heads = len(target)
    losses = torch.cat([objective_rows(objective, result, goal) for result, objective, goal in (one, more)])
    pick = losses.unflatten(0, (-1, heads)).argmin(0).expand(heads, target.shape[1])[None, ..., None]

    def choose(left: Tensor, right: Tensor) -> Tensor:
        stacked = torch.cat([left, right]).unflatten(0, (-1, heads))
        return stacked.gather(0, pick.expand(1, *stacked.shape[1:]))[0]

    scale, zero = choose(first.scale, others.scale), choose(first.zero, others.zero)
    return Quantized(choose(first.integers, others.integers), scale, zero)


def _factor(index: int) -> float:
    """1.04, 0.96, 1.08, 0.92, ..."""
    return 1 + 0.04 * (index // 2 + 1) * (1 if index % 2 == 0 else -1)


def objective_rows(objective: Objective, result: Quantized, target: Tensor) -> Tensor:
    """The loss by row (heads, r) where rows are independent, by head (heads, 1) where H_out ties them."""
    error = result.dequantize() - target
    losses = (objective.gradient(error) * error).sum(-1)
    return losses if objective.h_out is None else losses.sum(-1, keepdim=True)


@stage("rows")
def _compensate(
    target: Tensor, objective: Objective, settings: Settings, grid: tuple[Tensor, Tensor] | None = None
) -> Quantized:
    """Row blocks of every head, each with its own grid, then the rows below are moved to make up for its error.

    `grid` is scale and zero (heads, r, groups) to round to; None searches them for each row block.
    """
    heads, rows, columns = target.shape
    group = settings.group_size or columns
    order = descending(objective.h_in, target.dtype) if settings.act_order else None
    upper = objective.once(
        ("upper", settings.act_order),
        lambda: inverse_factor(  # which takes what it is given for its own
            (objective.h_in if order is None else permute(objective.h_in, order)).double()
        ).to(target.dtype),
    )
    h_in = objective.h_in.to(target.dtype)

    work = target.clone()
    integers = torch.empty_like(target, dtype=torch.uint8)
    scale = target.new_empty(heads, rows, columns // group)
    zero = torch.empty_like(scale)
    taken = rows if objective.h_out is None else min(settings.rows, rows)
    lower = None if objective.h_out is None else inverse_factor(objective.h_out).transpose(-1, -2).to(target.dtype)
    batch = h_in.shape[0]  # heads that share an H_in are rows of one problem
    for start in range(0, rows, taken):
        stop = min(start + taken, rows)
        block = work[:, start:stop]
        flat = block.reshape(batch, -1, columns)
        given = None
        if grid is not None:
            given = tuple(part[:, start:stop].reshape(batch, flat.shape[1], -1) for part in grid)
        found, s, z = round_columns(flat, h_in, upper, order, group, settings.grid_settings, given)
        integers[:, start:stop] = found.view_as(block)
        scale[:, start:stop] = s.reshape(heads, stop - start, -1)
        zero[:, start:stop] = z.reshape(heads, stop - start, -1)
        if lower is not None and stop < rows:
            error = block - Quantized(integers[:, start:stop], scale[:, start:stop], zero[:, start:stop]).dequantize()
            solved = torch.linalg.solve_triangular(lower[:, start:stop, start:stop], error, upper=False)
            work[:, stop:] -= lower[:, stop:, start:stop] @ solved
    return Quantized(integers, scale, zero)
