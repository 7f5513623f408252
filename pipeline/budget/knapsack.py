"""The choice of one option for each item that costs least and fits: a knapsack of multiple choice, solved exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

TIE = 1e-9  # of the largest cost, for each part of the room that is taken: of equal costs the smaller option


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
    items = np.repeat(np.arange(len(costs)), [len(own) for own in costs])
    cost, size = np.concatenate([np.asarray(own, float) for own in costs]), np.concatenate([list(own) for own in sizes])
    scale = max(float(np.abs(cost).max()), 1e-300)
    one = (items[None] == np.arange(len(costs))[:, None]).astype(float)
    found = milp(
        cost / scale + TIE * size / max(1, size.max()),
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(size[None] / max(1, room), -np.inf, 1)],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise RuntimeError(f"the solver of the budget found nothing: {found.message}")
    chosen = np.flatnonzero(np.round(found.x) == 1)
    starts = np.concatenate([[0], np.cumsum([len(own) for own in costs])[:-1]])
    return [int(number) for number in chosen - starts]
