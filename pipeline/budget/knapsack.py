"""The choice of one option for each item that costs least and fits: a knapsack of multiple choice, solved exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp


def cheapest(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], room: int) -> list[int] | None:
    """The option of each item, so that the sum of sizes is at most `room` and that of costs the least there is.

    Args:
        costs: of each item, those of its options.
        sizes: likewise.
        room: for all of them.

    Returns:
        The numbers of the options; None where not even the smallest fit.
    """
    if sum(min(own) for own in sizes) > room:
        return None
    kept = [_worth(*own) for own in zip(costs, sizes, strict=True)]
    items = np.repeat(np.arange(len(costs)), [len(own) for own in kept])
    cost = np.array([own[i] for own, worth in zip(costs, kept, strict=True) for i in worth], float)
    size = np.array([own[i] for own, worth in zip(sizes, kept, strict=True) for i in worth], float)
    scale = max(float(np.abs(cost).max()), 1e-300)
    one = (items[None] == np.arange(len(costs))[:, None]).astype(float)
    found = milp(
        cost / scale,
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(size[None] / max(1, room), -np.inf, 1)],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise RuntimeError(f"the solver of the budget found nothing: {found.message}")
    chosen = np.flatnonzero(np.round(found.x) == 1)
    numbers = [i for worth in kept for i in worth]
    return [numbers[at] for at in chosen]


def _worth(costs: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """The options that no other one beats: of equal costs the smallest."""
    order = sorted(range(len(costs)), key=lambda i: (sizes[i], costs[i]))
    worth, least = list[int](), float("inf")
    for i in order:
        if costs[i] < least:
            worth.append(i)
            least = costs[i]
    return worth
