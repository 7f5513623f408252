"""Where refinement ends: no sweep leaves an optimum, and nothing next to what converged is better, by brute force."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rotoboa.boa.objective.objective import Objective
from rotoboa.boa.solver.refine import sweep
from rotoboa.boa.solver.rounding import Quantized

from ..problems import KINDS, SLACK, damped_problem, dense_losses, nearest, refine_from


@KINDS
@pytest.mark.parametrize("group", [16, 4])
def test_sweep_keeps_its_books(group: int, heads: int, shared: bool, h_out: bool) -> None:
    """E H_in follows the integers, and the rows that moved are named."""
    target, objective = damped_problem(heads, 6, 16, h_out=h_out, shared=shared)
    start = nearest(target, 3, group)
    q = start.integers.double()
    inner = (start.dequantize() - target) @ objective.h_in
    before = dense_losses(start, target, objective)
    moved = sweep(inner, q, start.scale, objective.h_in, objective.h_out, 7)
    result = Quantized(q.to(torch.uint8), start.scale, start.zero)
    assert torch.equal(moved, (result.integers != start.integers).any(-1)) and moved.any()
    torch.testing.assert_close(inner, (result.dequantize() - target) @ objective.h_in, rtol=0, atol=1e-10)
    assert torch.equal(q, q.round()) and q.min() >= 0 and q.max() <= 7
    assert torch.all(dense_losses(result, target, objective) < before)


def _best(start: Quantized, target: Tensor, objective: Objective, levels: int) -> tuple[Tensor, Tensor]:
    """The integers (1, r, c) of least loss on the grid of `start`, and that loss, among all of them."""
    rows, columns = target.shape[1:]
    codes = torch.cartesian_prod(*[torch.arange(levels + 1, dtype=torch.float64)] * (rows * columns))
    all_q = codes.view(-1, rows, columns)
    errors = (all_q - start.zero[0]) * start.scale[0] - target[0]
    losses = Objective(objective.h_in, objective.h_out).loss(errors)
    return all_q[losses.argmin()][None], losses.min()


@pytest.mark.parametrize("h_out", [False, True])
def test_the_optimum_stays(h_out: bool) -> None:
    """2 x 3 with 2 bits: the best of all 4,096 is known, and no sweep leaves it."""
    for seed in range(5):
        target, objective = damped_problem(1, 2, 3, h_out=h_out, seed=seed)
        start = nearest(target, 2)
        best, least = _best(start, target, objective, 3)
        q = best.clone()
        inner = ((q - start.zero) * start.scale - target) @ objective.h_in
        assert not sweep(inner, q, start.scale, objective.h_in, objective.h_out, 3).any()
        assert torch.equal(q, best)
        # and what sweeps reach is often, never less than, that optimum
        q = start.integers.double()
        inner = (start.dequantize() - target) @ objective.h_in
        while sweep(inner, q, start.scale, objective.h_in, objective.h_out, 3).any():
            pass
        reached = dense_losses(Quantized(q.to(torch.uint8), start.scale, start.zero), target, objective)
        assert least * (1 - 1e-9) <= reached.sum() <= dense_losses(start, target, objective).sum()


@KINDS
@pytest.mark.parametrize(("rows", "columns", "group", "bits"), [(2, 3, 3, 2), (4, 12, 12, 2), (4, 12, 4, 3)])
def test_no_single_integer_improves_what_converged(
    rows: int, columns: int, group: int, bits: int, heads: int, shared: bool, h_out: bool
) -> None:
    """Every other value of every integer, by brute force."""
    for seed in range(2):
        target, objective = damped_problem(heads, rows, columns, h_out=h_out, shared=shared, seed=seed)
        result = refine_from(nearest(target, bits, group), target, objective, bits, 200)
        least = dense_losses(result, target, objective)
        for head, r, c in itertools.product(range(heads), range(rows), range(columns)):
            for other in range(2**bits):
                integers = result.integers.clone()
                integers[head, r, c] = other
                changed = Quantized(integers[head, None], result.scale[head, None], result.zero[head, None])
                own = Objective(
                    objective.h_in if len(objective.h_in) == 1 else objective.h_in[head, None],
                    None if objective.h_out is None else objective.h_out[head, None],
                )
                assert dense_losses(changed, target[head, None], own)[0] >= least[head] / SLACK


@pytest.mark.parametrize("seed", range(3))
def test_no_neighbouring_scale_improves_what_converged(seed: int) -> None:
    """One scale a row, rows independent: the next float16 up and the next down are both worse."""
    target, objective = damped_problem(1, 8, 16, h_out=False, seed=seed)
    result = refine_from(nearest(target, 3), target, objective, 3, 200)
    by_row = _row_losses(result, target, objective)
    for direction in (0.0, 65504.0):
        scale = torch.nextafter(result.scale.half(), torch.tensor(direction).half()).double()
        assert not torch.equal(scale, result.scale)
        assert torch.all(_row_losses(replace(result, scale=scale), target, objective) >= by_row / SLACK)


def _row_losses(result: Quantized, target: Tensor, objective: Objective) -> Tensor:
    error = result.dequantize() - target
    return ((error @ objective.h_in) * error).sum(-1)


def test_a_scale_better_than_the_rounded_optimum_stays() -> None:
    """Where H_out ties rows, the best stored scales are not the best scales rounded: who has them keeps them."""
    kept = 0
    for seed in range(4):
        target, objective = damped_problem(1, 6, 16, h_out=True, seed=seed)
        found = refine_from(nearest(target, 4), target, objective, 4, 200)
        best, least = found, dense_losses(found, target, objective)[0]
        improved = True
        while improved:  # one neighbour at a time
            improved = False
            for row, direction in itertools.product(range(6), (0.0, 65504.0)):
                scale = best.scale.clone()
                scale[0, row] = torch.nextafter(scale[0, row].half(), torch.tensor(direction).half()).double()
                loss = dense_losses(replace(best, scale=scale), target, objective)[0]
                if loss < least / SLACK:
                    best, least, improved = replace(best, scale=scale), loss, True
        kept += not torch.equal(best.scale, found.scale)
        again = refine_from(best, target, objective, 4, 1)
        assert dense_losses(again, target, objective)[0] <= least * SLACK
    assert kept > 0
