"""The exact knapsack of a budget, against every choice there is."""

import itertools

import numpy as np
import pytest

from rotoboa.pipeline.budget.knapsack import cheapest


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_best_of_all_choices(seed: int) -> None:
    random = np.random.default_rng(seed)
    items = int(random.integers(1, 7))
    sizes = [sorted(int(s) for s in random.integers(1, 1000, random.integers(1, 5))) for _ in range(items)]
    costs = [sorted(random.exponential(10.0 ** -random.integers(0, 4), len(own)), reverse=True) for own in sizes]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    for room in (least - 1, least, (least + most) // 2, most, 2 * most):
        fitting = [
            (sum(own[i] for own, i in zip(costs, choice, strict=True)), choice)
            for choice in itertools.product(*(range(len(own)) for own in sizes))
            if sum(own[i] for own, i in zip(sizes, choice, strict=True)) <= room
        ]
        found = cheapest(costs, sizes, room)
        if not fitting:
            assert found is None
            continue
        assert found is not None and sum(own[i] for own, i in zip(sizes, found, strict=True)) <= room
        cost = sum(own[i] for own, i in zip(costs, found, strict=True))
        assert cost == pytest.approx(min(fitting)[0], rel=1e-6, abs=1e-5 * max(map(max, costs)))


def test_of_equal_costs_the_smaller_is_taken() -> None:
    assert cheapest([[1.0, 0.0, 0.0], [0.0, 0.0]], [[10, 20, 30], [5, 6]], 100) == [1, 0]


def test_as_many_units_as_a_large_model_has() -> None:
    """80 blocks of four units, whose sizes differ a thousandfold from their differences."""
    random = np.random.default_rng(0)
    sizes = [[bits * (2**20 + 64 * int(random.integers(9))) for bits in (2, 3, 4, 8)] for _ in range(320)]
    costs = [[float(c) for c in random.lognormal(0, 2) * np.array([16, 4, 1, 1e-3])] for _ in range(320)]
    room = 3 * sum(own[0] // 2 for own in sizes)
    found = cheapest(costs, sizes, room)
    assert found is not None
    taken = sum(own[i] for own, i in zip(sizes, found, strict=True))
    assert 0.999 * room < taken <= room
    uniform = sum(own[1] for own in costs)
    assert sum(own[i] for own, i in zip(costs, found, strict=True)) < uniform
