"""Grids of levels: E2M1 and E4M3 against compressed-tensors, and each kernel's forms on it against each other."""

import pytest
import torch
from compressed_tensors.quantization import FP8_E4M3_DATA, QuantizationArgs
from compressed_tensors.quantization.quant_args import round_to_quantized_type_args
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from torch import Tensor

from rotoboa.boa.kernels import dispatch as kernels
from rotoboa.boa.kernels import squares
from rotoboa.boa.kernels.levels import (
    E2M1,
    E2M1_ZERO,
    E4M3,
    VALUES,
    beyond,
    beyond_one,
    middle_of,
    nearest,
    nearest_float,
    step_above,
    steps_beside,
)
from rotoboa.boa.objective.objective import Objective, inverse_factor
from rotoboa.boa.solver.refine import sweep

from ..problems import damped_gram, random

TIED = pytest.mark.parametrize("tied", [True, False])
EIGHT_BITS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
GRIDS = {E2M1: list(VALUES), E4M3: (512 * EIGHT_BITS[EIGHT_BITS.isfinite()].unique() + E4M3 // 2).tolist()}
EACH = pytest.mark.parametrize("levels", list(GRIDS))


def _random(*shape: int, seed: int) -> Tensor:
    return random(*shape, seed=seed, dtype=torch.float32)


def _scales(levels: int, *shape: int, seed: int) -> Tensor:
    """So large that weights reach the ends of E2M1, and the many steps of E4M3."""
    return (_random(*shape, seed=seed).abs() * 0.1 + 0.1) * (1 if levels == E2M1 else 2.0**-16)


def _start(heads: int, rows: int, columns: int, *, tied: bool, levels: int = E2M1) -> tuple[Tensor, ...]:
    """E H_in, integers, scales of groups of 16, H_in, H_out of a weight rounded to the nearest."""
    h_in, h_out = damped_gram(heads, columns, 1).float(), damped_gram(heads, rows, 2).float() if tied else None
    weight = _random(heads, rows, columns, seed=5)
    scale = _scales(levels, heads, rows, columns // 16, seed=6)
    wide = scale.repeat_interleave(16, -1)
    q = nearest(weight / wide, 0, levels)
    return ((q - middle_of(levels)) * wide - weight) @ h_in, q, scale, h_in, h_out  # type: ignore[return-value]


def test_ties_and_ends_are_those_of_compressed_tensors() -> None:
    x = torch.arange(-8 * 64, 8 * 64 + 1) / 64  # each middle between two values is in it
    assert torch.equal((nearest(2 * x, E2M1_ZERO, E2M1) - E2M1_ZERO) / 2, cast_to_fp4(x.clamp(-6, 6)) + 0.0)


def test_eight_bits_are_rounded_as_compressed_tensors_does() -> None:
    assert len(GRIDS[E4M3]) == 253 and 2 * 512 * FP8_E4M3_DATA.max == E4M3
    ends = torch.tensor(GRIDS[E4M3]) - E4M3 // 2
    x = torch.cat([ends, (ends[1:] + ends[:-1]) / 2, _random(2000, seed=1) * 1e4, torch.tensor([3e5, -3e5])])
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True)
    limits = (torch.tensor(FP8_E4M3_DATA.min), torch.tensor(FP8_E4M3_DATA.max))
    expected = 512 * round_to_quantized_type_args(x / 512, args, *limits) + E4M3 // 2
    assert torch.equal(nearest(x.clone(), 0, E4M3), expected)
    assert [nearest_float(value, E4M3) + E4M3 // 2 for value in x.numpy()] == expected.tolist()


def test_the_grid_is_the_values_of_e2m1() -> None:
    found = nearest(torch.linspace(-40, 40, 10_001), E2M1_ZERO, E2M1).unique()
    assert found.tolist() == list(VALUES)
    assert ((found - E2M1_ZERO) / 2).tolist()[7:] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@EACH
def test_neighbours(levels: int) -> None:
    values = GRIDS[levels]
    at = torch.tensor(values, dtype=torch.float32)
    above, below = steps_beside(at, levels)
    assert torch.equal((at + above)[:-1], at[1:]) and torch.equal((at - below)[1:], at[:-1])
    assert [step_above(float(value), levels) for value in values[:-1]] == above[:-1].tolist()
    assert [step_above(float(value), 7) for value in range(7)] == [1] * 7
    assert [float(step) for step in steps_beside(torch.tensor(3.0), 7)] == [1, 1]


@pytest.mark.parametrize("levels", [7, *GRIDS])
def test_one_number_is_as_many(levels: int) -> None:
    at = torch.tensor(GRIDS.get(levels, range(8)), dtype=torch.float32)[:, None].expand(-1, 101)
    step = torch.linspace(-1, 1, 101).mul(30 if levels < E4M3 else 9e4).expand(len(at), -1)
    expected = [beyond_one(a, s, levels) for a, s in zip(at.flatten().numpy(), step.flatten().numpy(), strict=True)]
    assert beyond(at, step.clone(), levels).flatten().tolist() == expected


@EACH
def test_rounding_is_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch, levels: int) -> None:
    block, upper = _random(2, 40, 64, seed=1), inverse_factor(damped_gram(2, 64, 2)).float()
    scale = _scales(levels, 2, 40, 64, seed=3)
    given = (block, upper, scale, torch.full_like(scale, middle_of(levels)), levels)
    own = kernels.round_block(*given)
    monkeypatch.setattr(kernels, "is_compiled", lambda tensor: False)
    for found, expected in zip(own, kernels.round_block(*given), strict=True):
        assert torch.equal(found, expected)
    assert set(own[0].unique().tolist()) <= set(GRIDS[levels])
    assert len(own[0].unique()) == (15 if levels == E2M1 else pytest.approx(150, abs=40))


@EACH
@TIED
def test_descent_is_the_same_and_lowers_the_objective(monkeypatch: pytest.MonkeyPatch, tied: bool, levels: int) -> None:
    inner, q, scale, h_in, h_out = _start(3, 8, 96, tied=tied, levels=levels)
    objective = Objective(h_in.double(), None if h_out is None else h_out.double())
    weight_error = torch.linalg.solve(h_in.double(), inner.double(), left=False)
    results = []
    for fast in (True, False):
        own, moved = inner.clone(), q.clone()
        if not fast:
            monkeypatch.setattr(kernels, "is_compiled", lambda tensor: False)
            monkeypatch.setattr("rotoboa.boa.solver.refine.is_compiled", lambda tensor: False)
        sweep(own, moved, scale, h_in, h_out, levels)
        results.append(moved)
        error = weight_error + (moved - q).double() * scale.double().repeat_interleave(16, -1)
        torch.testing.assert_close(own.double(), error @ h_in.double(), rtol=0, atol=1e-3)
        assert torch.all(objective.loss(error) < objective.loss(weight_error))
    assert set(results[0].unique().tolist()) <= set(GRIDS[levels]) and int((results[0] != q).sum()) > 100
    # Sums over tied rows are in another order, and a tie may then go another way.
    assert torch.equal(*results) if not tied else float((results[0] != results[1]).float().mean()) < 0.01


@EACH
def test_a_search_takes_the_same_steps_and_the_cheapest_first(monkeypatch: pytest.MonkeyPatch, levels: int) -> None:
    inner, q, scale, h_in, _ = _start(2, 3, 160, tied=False, levels=levels)
    values = GRIDS[levels]
    wide = scale.repeat_interleave(16, -1)
    found = kernels.search_block(inner, q, wide, h_in, levels, 300)
    one = kernels.search_block(inner, q, wide, h_in, levels, 1)
    monkeypatch.setattr(kernels, "is_compiled", lambda tensor: False)
    assert torch.equal(found, kernels.search_block(inner, q, wide, h_in, levels, 300))
    assert set(found.unique().tolist()) <= set(values)

    def change(after: Tensor) -> Tensor:
        step = ((after - q) * wide).double()
        return (2 * step * inner.double() + (step @ h_in.double()) * step).sum(-1)

    for head in range(2):
        for row in range(3):
            costs = []
            for column in range(160):
                place = values.index(int(q[head, row, column]))
                for beside in {max(place - 1, 0), min(place + 1, len(values) - 1)} - {place}:
                    moved = q.clone()
                    moved[head, row, column] = values[beside]
                    costs.append(float(change(moved)[head, row]))
            assert float(change(one)[head, row]) == pytest.approx(min(0.0, *costs), abs=1e-4)
    assert torch.all(change(found) <= change(one)) and torch.any(change(found) < change(one))


@EACH
def test_squares_of_a_search_are_the_same(monkeypatch: pytest.MonkeyPatch, levels: int) -> None:
    weight, metric = _random(2, 5, 16, seed=1), _random(2, 16, seed=2).abs()
    scale = _scales(levels, 2, 5, 7, seed=3)
    given = (weight, scale, torch.full_like(scale, middle_of(levels)), metric, levels)
    own = squares.weighted_squares(*given)
    monkeypatch.setattr(squares, "is_compiled", lambda tensor: False)
    torch.testing.assert_close(own, squares.weighted_squares(*given))
