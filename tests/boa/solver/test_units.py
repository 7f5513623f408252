"""Problems cut into heads or rows: every one is solved once, by ranks of like loads, and to the same end."""

import pytest
import torch
from torch import Tensor

from rotoboa.boa.objective.objective import Objective
from rotoboa.boa.ranks import Ranks
from rotoboa.boa.solver.rounding import quantize
from rotoboa.boa.solver.rounding_settings import Settings
from rotoboa.boa.solver.units import PIECES, Problem, _joined, _solve_run, plan, solve

from ..problems import random, random_gram

SETTINGS = Settings(bits=3, refine=2, starts=2, rows=2)


class Some(Ranks):
    """One of several that knows nothing of the others."""

    def __init__(self, size: int, deterministic: bool = False) -> None:
        super().__init__(deterministic)
        self.size = size


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed, dtype=torch.float32)


def gram(batch: int, size: int, seed: int) -> Tensor:
    return random_gram(batch, size=size, seed=seed).float()


def problem(kind: str) -> Problem:
    """Heads that share an H_in and have each an H_out; heads with an H_in each; two layers of independent rows."""
    if kind == "queries":
        return Problem(["q", "k"], [4, 2], numbers(6, 4, 24), Objective(gram(1, 24, 1), gram(6, 4, 2)), SETTINGS)
    if kind == "values":
        goal = Objective(gram(3, 24, 1), gram(3, 4, 2), drift=numbers(3, 4, 24, seed=3))
        return Problem(["v"], [3], numbers(3, 4, 24), goal, SETTINGS)
    residual = 0.1 * numbers(1, 24, 24, seed=3)
    return Problem(["gate", "up"], [1, 1], numbers(2, 17, 24), Objective(gram(1, 24, 1), residual=residual), SETTINGS)


def solved(given: Problem, ranks: Ranks, references: bool = False) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What all ranks would find together."""
    runs = plan([given], ranks)
    found = _joined(given, [(run, _solve_run(given, run, references)) for run in runs], references)
    return found.result.integers, found.result.dequantize(), found.losses


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_head_and_row_goes_to_one_rank(size: int, deterministic: bool) -> None:
    problems = [problem(kind) for kind in ("queries", "values", "layer")]
    ranks = Some(size, deterministic)
    runs = plan(problems, ranks)
    for i, given in enumerate(problems):
        units = torch.cat([run.units for run in runs if run.problem == i])
        assert sorted(units.tolist()) == list(range(given.units))
        assert sum(run.problem == i for run in runs) <= max(PIECES, size)
    costs = [given.cost for given in problems]
    loads = [0.0] * size
    for run in runs:
        loads[run.rank] += costs[run.problem] * len(run.units) / problems[run.problem].units
    # Graham's bound: above the mean by no more than one piece.
    largest = max(costs[run.problem] / problems[run.problem].units for run in runs) + sum(costs) / size
    assert max(loads) <= sum(costs) / size + largest


def test_deterministic_pieces_do_not_depend_on_the_number_of_ranks() -> None:
    problems = [problem(kind) for kind in ("queries", "values", "layer")]
    pieces = [[(run.problem, run.units.tolist()) for run in plan(problems, Some(size, True))] for size in (1, 2, 5)]
    assert pieces[0] == pieces[1] == pieces[2]


@pytest.mark.parametrize("kind", ["queries", "values", "layer"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_parts_are_solved_as_the_whole_is(kind: str, deterministic: bool) -> None:
    given = problem(kind)
    whole = quantize(given.weight, given.objective, SETTINGS)
    alone = solved(given, Ranks(), references=True)
    assert torch.equal(alone[0], whole.integers) and torch.equal(alone[1], whole.dequantize())
    error = whole.dequantize() - given.weight
    torch.testing.assert_close(alone[2]["found"], given.objective.loss(error))
    for size in (2, 3):
        integers, weights, losses = solved(given, Some(size, deterministic), references=True)
        assert torch.equal(integers, whole.integers) and torch.equal(weights, whole.dequantize())
        for name, loss in alone[2].items():
            torch.testing.assert_close(losses[name], loss, rtol=1e-4, atol=1e-4)


def test_a_problem_that_cannot_be_solved_is_named() -> None:
    given = problem("layer")
    given.objective.h_in[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="gate, up: its input in the quantized stream holds NaN or Inf"):
        solve([given], Ranks())
