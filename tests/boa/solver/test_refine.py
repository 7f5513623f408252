"""What refinement promises, against dense losses in float64: no round raises the loss of a head, from any start."""

from dataclasses import replace

import pytest
import torch

from rotoboa.boa.kernels.squares import round_to
from rotoboa.boa.solver.grid import GridSettings, search
from rotoboa.boa.solver.refine import refine
from rotoboa.boa.solver.rounding import Quantized, quantize
from rotoboa.boa.solver.rounding_settings import Settings

from ..problems import KINDS, SLACK, check_stored, damped_problem, dense_losses, nearest, random, refine_from


@KINDS
@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_no_round_raises_the_loss(
    bits: int, symmetric: bool, group: int | None, heads: int, shared: bool, h_out: bool
) -> None:
    """Head by head, after each round of scales and integers; and from nearest rounding much is gained."""
    target, objective = damped_problem(heads, 6, 16, h_out=h_out, shared=shared)
    result = start = nearest(target, bits, group, symmetric=symmetric)
    losses = [dense_losses(start, target, objective)]
    for rounds in range(1, 7):
        result = refine_from(start, target, objective, bits, rounds)
        check_stored(result, bits)
        losses.append(dense_losses(result, target, objective))
        assert torch.all(losses[-1] <= losses[-2] * SLACK)
    assert losses[-1].sum() < 0.8 * losses[0].sum()
    if symmetric:
        assert torch.all(result.zero == 2 ** (bits - 1))


@pytest.mark.parametrize("h_out", [False, True])
@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("bits", [2, 4])
def test_error_compensation_is_improved_too(bits: int, group: int | None, h_out: bool) -> None:
    losses = torch.zeros(2, dtype=torch.float64)
    for seed in range(3):
        target, objective = damped_problem(2, 8, 24, h_out=h_out, seed=seed)
        settings = Settings(bits=bits, group_size=group, refine=0, starts=1, tabu=0, rows=1).but(damping=0.0)
        start = quantize(target, objective, settings)
        refined = refine_from(start, target, objective, bits, 4)
        pair = [dense_losses(result, target, objective) for result in (start, refined)]
        assert torch.all(pair[1] <= pair[0] * SLACK)
        losses += torch.stack(pair).sum(-1)
    assert losses[1] < 0.97 * losses[0]


@pytest.mark.parametrize("h_out", [False, True])
def test_from_any_start(h_out: bool) -> None:
    """Random integers, far too large and too small scales: every round helps, and the result is as good as others."""
    target, objective = damped_problem(2, 6, 16, h_out=h_out)
    good = dense_losses(refine_from(nearest(target, 3), target, objective, 3, 20), target, objective).sum()
    for factor in (0.25, 1.0, 4.0):
        start = nearest(target, 3)
        integers = torch.randint(0, 8, target.shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        start = Quantized(integers, (start.scale * factor).half().double(), start.zero)
        result, losses = start, [dense_losses(start, target, objective)]
        for _ in range(20):
            result = refine_from(result, target, objective, 3, 1)
            losses.append(dense_losses(result, target, objective))
            assert torch.all(losses[-1] <= losses[-2] * SLACK)
        assert losses[-1].sum() < 0.2 * losses[0].sum() and losses[-1].sum() < 10 * good


@pytest.mark.parametrize("h_out", [False, True])
def test_more_columns_than_a_block(h_out: bool) -> None:
    """300 columns: what later blocks know of earlier moves."""
    target, objective = damped_problem(2, 4, 300, h_out=h_out)
    start = nearest(target, 2)
    losses = [dense_losses(start, target, objective)]
    for rounds in range(1, 4):
        losses.append(dense_losses(refine_from(start, target, objective, 2, rounds), target, objective))
        assert torch.all(losses[-1] <= losses[-2] * SLACK)
    assert losses[-1].sum() < 0.5 * losses[0].sum()


@pytest.mark.parametrize("h_out", [False, True])
def test_float32(h_out: bool) -> None:
    """As it runs in practice; what float32 loses of a loss is 1e-5 of it."""
    target, objective = damped_problem(2, 8, 24, h_out=h_out)
    narrow = target.float()
    start = nearest(narrow, 3)
    losses = [dense_losses(start, target, objective)]
    for rounds in range(1, 5):
        result = refine_from(start, narrow, objective, 3, rounds)
        assert result.scale.dtype == torch.float32
        check_stored(result, 3)
        losses.append(dense_losses(result, target, objective))
        assert torch.all(losses[-1] <= losses[-2] * (1 + 1e-5))


def test_without_error_nothing_moves() -> None:
    start = nearest(random(2, 6, 16), 3, 4)
    target = start.dequantize()
    for h_out in (False, True):
        _, objective = damped_problem(2, 6, 16, h_out=h_out)
        result = refine_from(start, target, objective, 3, 3)
        assert torch.equal(result.integers, start.integers)
        assert torch.equal(result.scale, start.scale) and torch.equal(result.zero, start.zero)


def test_scale_is_found_where_integers_are_right() -> None:
    """Scales off by 6 %, integers right: one update finds the stored scale that the target was made with."""
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(0, 16, (2, 5, 16), generator=generator, dtype=torch.uint8)
    true = Quantized(integers, torch.full((2, 5, 1), 0.0625, dtype=torch.float64), torch.full((2, 5, 1), 8.0).double())
    target = true.dequantize()
    off = replace(true, scale=(true.scale * 1.06).half().double())
    for h_out in (False, True):
        _, objective = damped_problem(2, 5, 16, h_out=h_out)
        result = refine_from(off, target, objective, 4, 1)
        assert torch.equal(result.scale, true.scale) and torch.equal(result.integers, true.integers)


@pytest.mark.parametrize("h_out", [False, True])
def test_rows_of_zeros(h_out: bool) -> None:
    """A row, and a head, without weights: integers at the zero point, which no scale moves."""
    target, objective = damped_problem(3, 6, 16, h_out=h_out)
    target[0, 2] = 0
    target[1] = 0
    start = nearest(target, 3)
    result = refine_from(start, target, objective, 3, 5)
    check_stored(result, 3)
    assert torch.isfinite(result.dequantize()).all()
    assert result.dequantize()[1].abs().max() == 0
    if not h_out:
        assert result.dequantize()[0, 2].abs().max() == 0
    assert torch.all(dense_losses(result, target, objective) <= dense_losses(start, target, objective) * SLACK)


def test_what_is_given_is_not_written_to() -> None:
    target, objective = damped_problem(2, 6, 16, h_out=True)
    start = nearest(target, 3)
    assert objective.h_out is not None
    given = (target, start.integers, start.scale, start.zero, objective.h_in, objective.h_out)
    copies = [tensor.clone() for tensor in given]
    result = refine_from(start, target, objective, 3, 3)
    assert not torch.equal(result.integers, start.integers)
    assert all(torch.equal(*pair) for pair in zip(copies, given, strict=True))


def test_no_rounds() -> None:
    target, objective = damped_problem(2, 6, 16, h_out=True)
    scale, zero = search(target, None, GridSettings(3))
    integers = round_to(target, scale[..., None], zero[..., None], 7).to(torch.uint8)
    result = refine(target, integers, scale[..., None], zero[..., None], objective, GridSettings(3), rounds=0)
    assert torch.equal(result[0], integers) and torch.equal(result[1], scale[..., None])
