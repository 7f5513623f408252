"""Projections of a block are solved, and take their place in the quantized block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ..objective.objective import Objective
from ..objective.statistics import InputStatistics
from ..objective.totals import Total
from ..precision import exact_products
from ..solver.references import relative_losses
from ..solver.rounding import Quantized
from ..solver.units import Problem, Solved, solve
from ..stopwatch import stage
from .context import BlockContext, BlockResult


class Layers(NamedTuple):
    """Projections that share an H_in, and how many heads each has; the objective is asked for when they are solved."""

    names: list[str]
    objective: Callable[[], Objective]
    heads: list[int]


def layer_objective(total: Total[InputStatistics], weight: torch.Tensor | None = None) -> Callable[[], Objective]:
    """The objective of a layer, once it is asked for; of its weight where outputs were wanted."""
    return lambda: total.value().objective(weight)


def alike(context: BlockContext, names: Sequence[str], inputs: Total[InputStatistics]) -> list[Layers]:
    """Layers that read one input, those with as many rows together: they are solved as heads of one problem."""
    by_rows: dict[int, list[str]] = {}
    for name in names:
        by_rows.setdefault(len(context.weight(name)), []).append(name)
    return [Layers(same, layer_objective(inputs), [1] * len(same)) for same in by_rows.values()]


@stage("losses")
@exact_products()
def solve_layers(context: BlockContext, *layers: Layers) -> BlockResult:
    """Solve projections and put them into the quantized block; those of an earlier run are only put there.

    Args:
        context: whose settings say how.
        layers: they do not depend on each other. All ranks solve them together; one rank alone takes them one after
            another, so that no two objectives are in memory.

    Raises:
        ValueError: a weight or an objective is not finite; the message names the projections.
    """
    found = BlockResult()
    for group in [layers] if context.share.ranks.size > 1 else [(one,) for one in layers]:
        found |= solve_together(context, group)
    return found


def solve_together(context: BlockContext, layers: Sequence[Layers]) -> BlockResult:
    """As `solve_layers`, all of them at once."""
    names = [name for one in layers for name in one.names if context.settings_of(name) is not None]
    if context.previous is not None:
        found = BlockResult({name: context.previous[name] for name in names})
    else:
        found = BlockResult()
        problems = [problem for one in layers for problem in _problems(context, one)]
        solved = solve(problems, context.share.ranks, references=context.references)
        for problem, one_solved in zip(problems, solved, strict=True):
            found |= _found(context, problem, one_solved)
    for name in names:
        weight = context.quantized.get_parameter(f"{name}.weight")
        weight.data = found.results[name].dequantize().to(weight.device, weight.dtype)
    return found


def _problems(context: BlockContext, layers: Layers) -> list[Problem]:
    """One for all projections, or one for those of like settings; none of those that are left as they are."""
    settings = {name: context.settings_of(name) for name in layers.names}
    wanted = [own for own in dict.fromkeys(settings.values()) if own is not None]
    if not wanted:
        return []
    goal = layers.objective()
    shared = len(wanted) > 1 and len(goal.h_in) == 1  # several problems of one H_in, which is factored once
    goal = replace(goal, memo={}) if shared or context.share.ranks.deterministic else goal
    numbers = torch.arange(sum(layers.heads), device=goal.h_in.device).split(layers.heads)
    problems = []
    for own in wanted:
        chosen = [i for i, name in enumerate(layers.names) if settings[name] == own]
        names, heads = [layers.names[i] for i in chosen], [layers.heads[i] for i in chosen]
        stacked = [context.weight(name).unflatten(0, (h, -1)) for name, h in zip(names, heads, strict=True)]
        part = goal if len(chosen) == len(layers.names) else goal.of_heads(torch.cat([numbers[i] for i in chosen]))
        problems.append(Problem(names, heads, torch.cat(stacked), part, own))
    return problems


def _found(context: BlockContext, problem: Problem, solved: Solved) -> BlockResult:
    """By projection what was found of all heads of a problem; each loss is reported."""
    result, heads, found = solved.result, problem.heads, BlockResult()
    # An error of the size of the weight itself is 1.
    loss = solved.losses["found"].clamp_min(0) / solved.losses["zero"].clamp_min(1e-30)
    parts = [
        [piece.flatten(0, 1) for piece in tensor.split(heads)]
        for tensor in (result.integers, result.scale, result.zero)
    ]
    for i, (name, part) in enumerate(zip(problem.names, loss.split(heads), strict=True)):
        found.results[name] = Quantized(*(pieces[i] for pieces in parts))
        found.results[name].global_scale = problem.settings.global_scale
        found.losses[name] = float(part.mean())
        if result.damping > context.settings.damping:
            found.damping[name] = result.damping
        context.report(name, found.losses[name])
    if context.references:
        found.objectives.update(zip(problem.names, relative_losses(solved.losses, heads), strict=True))
    return found
