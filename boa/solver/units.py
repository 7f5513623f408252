"""Solving by all ranks: projections, heads and ranges of rows go to ranks by their cost, the largest first.

Rows that H_out does not tie together, and heads, are problems of their own, so that it changes no formula who solves
them. A matrix product of another shape may differ in its last bits, though. Deterministic pieces are the same however
many ranks there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.levels import dtype_of
from ..objective.objective import Objective
from ..ranks import Ranks
from .references import NAMES, reference_sums
from .rounding import Quantized, quantize
from .rounding_settings import Settings

PIECES = 16  # of a problem, in deterministic mode; more ranks than that find no work in it
FINE = 4  # pieces that a rank's part of the work is cut into where a problem is more than that


@dataclass(frozen=True)
class Problem:
    """Projections that share an objective, their heads stacked.

    Attributes:
        names: of the projections.
        heads: how many heads each of them has.
        weight: (heads, r, c) float32.
        objective: of all heads.
        settings: of the rounding of all of them.
    """

    names: list[str]
    heads: list[int]
    weight: Tensor
    objective: Objective
    settings: Settings

    @property
    def by_heads(self) -> bool:
        """Whether only whole heads can be solved apart: rows are tied, or each head has an H_in."""
        return self.objective.h_out is not None or len(self.objective.h_in) > 1

    @property
    def units(self) -> int:
        """Heads or rows."""
        return self.weight.shape[0] * (1 if self.by_heads else self.weight.shape[1])

    @property
    def cost(self) -> float:
        """Floating-point operations of solving all of it, roughly: products of rows and H_in, and decompositions."""
        (heads, rows, columns), settings = self.weight.shape, self.settings
        if settings.method == "rtn":
            return float(self.weight.numel())
        products: float = settings.starts * (1 + 3 * settings.refine) + 4
        if settings.tabu:  # its moves are slower than products
            products += 3 * settings.refine + 20 * settings.tabu
        outer = 0 if self.objective.h_out is None else heads * rows**3
        return float(products * heads * rows * columns**2 + 2 * len(self.objective.h_in) * columns**3 + outer)


@dataclass(frozen=True)
class Run:
    """What one rank solves in one go: heads or rows of a problem, by their numbers."""

    problem: int
    rank: int
    units: Tensor


@dataclass
class Solved:
    """What became of a problem.

    Attributes:
        result: integers, scales and zero points of all heads, and the damping of the piece that needed most.
        losses: (heads,) sums by name: `found` and `zero`, the objective at the result and at a zero weight, and those
            of `reference_sums`.
    """

    result: Quantized
    losses: dict[str, Tensor]


def plan(problems: Sequence[Problem], ranks: Ranks) -> list[Run]:
    """Who solves what. Every rank comes to the same plan."""
    costs = [problem.cost for problem in problems]
    if ranks.size == 1 and not ranks.deterministic:
        return [Run(i, 0, torch.arange(problem.units)) for i, problem in enumerate(problems)]
    part = sum(costs) / ranks.size
    pieces: list[tuple[float, int, Tensor]] = []
    for i, (problem, cost) in enumerate(zip(problems, costs, strict=True)):
        wanted = PIECES if ranks.deterministic else 1 if cost <= part else -(-FINE * cost // part)
        cut = torch.arange(problem.units).tensor_split(int(min(wanted, problem.units)))
        pieces += [(cost * len(units) / problem.units, i, units) for units in cut]
    loads, owners = [0.0] * ranks.size, [0] * len(pieces)
    for index in sorted(range(len(pieces)), key=lambda index: -pieces[index][0]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += pieces[index][0]
    if ranks.deterministic:
        return [Run(i, owner, units) for owner, (_, i, units) in zip(owners, pieces, strict=True)]
    merged: dict[tuple[int, int], list[Tensor]] = {}
    for owner, (_, i, units) in zip(owners, pieces, strict=True):
        merged.setdefault((i, owner), []).append(units)
    return [Run(i, owner, torch.cat(units)) for (i, owner), units in sorted(merged.items(), key=lambda item: item[0])]


def solve(problems: Sequence[Problem], ranks: Ranks, *, references: bool = False) -> list[Solved]:
    """Quantize problems, each rank its part, and give every rank all of the results.

    Raises:
        ValueError: as of `quantize`, with the names of the projections.
    """
    for problem in problems:
        try:
            problem.objective.check()
        except ValueError as error:
            raise ValueError(f"{', '.join(problem.names)}: {error}") from error
    runs = plan(problems, ranks)
    found: list[list[Tensor]] = []
    for run in runs:
        problem = problems[run.problem]
        if run.rank != ranks.rank:
            found.append(_empty(problem, run, references))
            continue
        ranks.tick()
        try:
            found.append(_solve_run(problem, run, references))
        except ValueError as error:
            raise ValueError(f"{', '.join(problem.names)}: {error}") from error
    ranks.exchange([[t for run, part in zip(runs, found, strict=True) if run.rank == rank for t in part]
                    for rank in range(ranks.size)])  # fmt: skip
    return [
        _joined(problem, [(run, part) for run, part in zip(runs, found, strict=True) if run.problem == i], references)
        for i, problem in enumerate(problems)
    ]


def _names(references: bool) -> list[str]:
    return ["found", "zero", *((*NAMES, "whole") if references else ())]


def _empty(problem: Problem, run: Run, references: bool) -> list[Tensor]:
    """Room for what another rank finds; as `_solve_run`."""
    heads, rows, columns = problem.weight.shape
    count = len(run.units) * (rows if problem.by_heads else 1)
    groups = columns // (problem.settings.group_size or columns)
    w = problem.weight
    return [
        w.new_empty(count, columns, dtype=dtype_of(problem.settings.grid_settings.levels)),
        w.new_empty(count, groups),
        w.new_empty(count, groups),
        w.new_empty(len(_names(references)), heads),
        torch.empty(1, dtype=torch.float64, device=w.device),
    ]


def _solve_run(problem: Problem, run: Run, references: bool) -> list[Tensor]:
    """Integers, scales and zero points by row; losses (names, heads), zero where nothing of a head is in; damping."""
    heads, rows, _ = problem.weight.shape
    goal, weight = problem.objective, problem.weight
    whole = len(run.units) == problem.units
    if not whole:
        goal, weight = _part(problem, run.units)
    result = quantize(weight, goal, problem.settings)
    by_rows = not (whole or problem.by_heads)
    owner = run.units.to(weight.device)
    owner = (
        torch.arange(heads, device=weight.device)
        if whole
        else owner.div(rows, rounding_mode="floor")
        if by_rows
        else owner
    )
    losses = {
        "found": _losses(goal, result.dequantize() - weight, by_rows),
        "zero": _losses(goal, weight, by_rows),
    }
    if references:
        losses |= reference_sums(weight, goal, problem.settings, result, by_rows=by_rows)
    table = torch.stack([weight.new_zeros(heads).index_add_(0, owner, loss.to(weight)) for loss in losses.values()])
    damping = torch.tensor([result.damping], dtype=torch.float64, device=weight.device)
    return [*(part.flatten(0, 1) for part in (result.integers, result.scale, result.zero)), table, damping]


def _losses(goal: Objective, error: Tensor, by_rows: bool) -> Tensor:
    """By head, or by row of the only head."""
    return (goal.gradient(error) * error).sum(-1)[0] if by_rows else goal.loss(error)


def _part(problem: Problem, units: Tensor) -> tuple[Objective, Tensor]:
    """The objective and the weight of some heads, or of some rows as those of one head."""
    goal, index = problem.objective, units.to(problem.weight.device)
    if problem.by_heads:
        return goal.of_heads(index), problem.weight[index]
    drift = None if goal.drift is None else goal.drift.flatten(0, 1)[index][None]
    return replace(goal, drift=drift), problem.weight.flatten(0, 1)[index][None]


def _joined(problem: Problem, parts: Sequence[tuple[Run, Sequence[Tensor]]], references: bool) -> Solved:
    heads, rows, _ = problem.weight.shape
    first = parts[0][1]
    table, damping = first[3], max(float(part[4]) for _, part in parts)
    whole = [tensor.unflatten(0, (heads, rows)) for tensor in first[:3]] if len(parts) == 1 else []
    if not whole:
        order = torch.cat([run.units for run, _ in parts])
        where = order.argsort().to(problem.weight.device)
        for stack in zip(*(part[:3] for _, part in parts), strict=True):
            by_unit = torch.cat([t.unflatten(0, (-1, rows)) if problem.by_heads else t for t in stack])[where]
            whole.append(by_unit if problem.by_heads else by_unit.unflatten(0, (heads, rows)))
        table = parts[0][1][3].clone()
        for _, part in parts[1:]:
            table += part[3]
    integers, scale, zero = whole
    return Solved(Quantized(integers, scale, zero, damping=damping), dict(zip(_names(references), table, strict=True)))
