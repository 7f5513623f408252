"""Refinement against dense losses and brute force, in float64."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rotoboa.boa.grid import GridSettings, round_to, search
from rotoboa.boa.objective import Objective
from rotoboa.boa.refine import refine, sweep
from rotoboa.boa.rounding import Quantized, Settings, quantize

# What summation order may lose of a loss, whose terms are some hundred times larger than it.
SLACK = 1 + 1e-10


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _gram(*batch: int, size: int, seed: int) -> Tensor:
    x = _random(*batch, 3 * size, size, seed=seed)
    x = (x + 0.7 * x[..., :1] + 0.7 * x.roll(1, -1)) * torch.linspace(0.3, 2, size, dtype=torch.float64)
    return x.transpose(-1, -2) @ x


def _problem(
    heads: int, rows: int, columns: int, *, h_out: bool, shared: bool = False, seed: int = 0
) -> tuple[Tensor, Objective]:
    """Targets, and a damped objective."""
    objective = Objective(
        _gram(1 if shared else heads, size=columns, seed=10 * seed + 1),
        _gram(heads, size=rows, seed=10 * seed + 3) if h_out else None,
    )
    return _random(heads, rows, columns, seed=10 * seed + 2), objective.damped(0.01)


def _nearest(target: Tensor, bits: int, group: int | None = None, *, symmetric: bool = False) -> Quantized:
    """Each weight to its nearest level: a start that leaves much to gain."""
    return quantize(target, None, Settings(bits=bits, method="rtn", group_size=group, symmetric=symmetric))


def _refined(start: Quantized, target: Tensor, objective: Objective, bits: int, rounds: int) -> Quantized:
    return Quantized(*refine(target, start.integers, start.scale, start.zero, objective, bits, rounds=rounds))


def _losses(result: Quantized, target: Tensor, objective: Objective) -> Tensor:
    """Of each head, by the Kronecker matrix of H_out and H_in."""
    losses = []
    for head, error in enumerate(result.dequantize() - target):
        h_in = objective.h_in[head if len(objective.h_in) > 1 else 0]
        h_out = torch.eye(len(error), dtype=torch.float64) if objective.h_out is None else objective.h_out[head]
        vec = error.double().flatten()
        losses.append(vec @ torch.kron(h_out, h_in) @ vec)
    return torch.stack(losses)


def _check(result: Quantized, bits: int) -> None:
    assert result.integers.dtype == torch.uint8 and int(result.integers.max()) <= 2**bits - 1
    assert torch.equal(result.scale, result.scale.half().to(result.scale.dtype)) and float(result.scale.min()) > 0
    assert torch.equal(result.zero, result.zero.round())
    assert float(result.zero.min()) >= 0 and float(result.zero.max()) <= 2**bits - 1


KINDS = pytest.mark.parametrize(
    ("heads", "shared", "h_out"),
    [(1, True, False), (1, True, True), (3, False, False), (3, False, True), (3, True, True), (3, True, False)],
)


@KINDS
@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_round_raises_the_loss(
    bits: int, symmetric: bool, group: int | None, heads: int, shared: bool, h_out: bool
) -> None:
    """Head by head, after each round of scales and integers; and from nearest rounding much is gained."""
    target, objective = _problem(heads, 6, 16, h_out=h_out, shared=shared)
    result = start = _nearest(target, bits, group, symmetric=symmetric)
    losses = [_losses(start, target, objective)]
    for rounds in range(1, 7):
        result = _refined(start, target, objective, bits, rounds)
        _check(result, bits)
        losses.append(_losses(result, target, objective))
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
        target, objective = _problem(2, 8, 24, h_out=h_out, seed=seed)
        settings = Settings(bits=bits, group_size=group, refine=0, starts=1, damping=0.0, rows=1)
        start = quantize(target, objective, settings)
        refined = _refined(start, target, objective, bits, 4)
        pair = [_losses(result, target, objective) for result in (start, refined)]
        assert torch.all(pair[1] <= pair[0] * SLACK)
        losses += torch.stack(pair).sum(-1)
    assert losses[1] < 0.97 * losses[0]


@pytest.mark.parametrize("h_out", [False, True])
def test_from_any_start(h_out: bool) -> None:
    """Random integers, far too large and too small scales: every round helps, and the result is as good as others."""
    target, objective = _problem(2, 6, 16, h_out=h_out)
    good = _losses(_refined(_nearest(target, 3), target, objective, 3, 20), target, objective).sum()
    for factor in (0.25, 1.0, 4.0):
        start = _nearest(target, 3)
        integers = torch.randint(0, 8, target.shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        start = Quantized(integers, (start.scale * factor).half().double(), start.zero)
        result, losses = start, [_losses(start, target, objective)]
        for _ in range(20):
            result = _refined(result, target, objective, 3, 1)
            losses.append(_losses(result, target, objective))
            assert torch.all(losses[-1] <= losses[-2] * SLACK)
        assert losses[-1].sum() < 0.2 * losses[0].sum() and losses[-1].sum() < 10 * good


@pytest.mark.parametrize("h_out", [False, True])
def test_more_columns_than_a_block(h_out: bool) -> None:
    """300 columns: what later blocks know of earlier moves."""
    target, objective = _problem(2, 4, 300, h_out=h_out)
    start = _nearest(target, 2)
    losses = [_losses(start, target, objective)]
    for rounds in range(1, 4):
        losses.append(_losses(_refined(start, target, objective, 2, rounds), target, objective))
        assert torch.all(losses[-1] <= losses[-2] * SLACK)
    assert losses[-1].sum() < 0.5 * losses[0].sum()


@pytest.mark.parametrize("h_out", [False, True])
def test_float32(h_out: bool) -> None:
    """As it runs in practice; what float32 loses of a loss is 1e-5 of it."""
    target, objective = _problem(2, 8, 24, h_out=h_out)
    narrow = target.float()
    start = _nearest(narrow, 3)
    losses = [_losses(start, target, objective)]
    for rounds in range(1, 5):
        result = _refined(start, narrow, objective, 3, rounds)
        assert result.scale.dtype == torch.float32
        _check(result, 3)
        losses.append(_losses(result, target, objective))
        assert torch.all(losses[-1] <= losses[-2] * (1 + 1e-5))


# sweep


@KINDS
@pytest.mark.parametrize("group", [16, 4])
def test_sweep_keeps_its_books(group: int, heads: int, shared: bool, h_out: bool) -> None:
    """E H_in follows the integers, and the rows that moved are named."""
    target, objective = _problem(heads, 6, 16, h_out=h_out, shared=shared)
    start = _nearest(target, 3, group)
    q = start.integers.double()
    inner = (start.dequantize() - target) @ objective.h_in
    before = _losses(start, target, objective)
    moved = sweep(inner, q, start.scale, objective.h_in, objective.h_out, 7)
    result = Quantized(q.to(torch.uint8), start.scale, start.zero)
    assert torch.equal(moved, (result.integers != start.integers).any(-1)) and moved.any()
    torch.testing.assert_close(inner, (result.dequantize() - target) @ objective.h_in, rtol=0, atol=1e-10)
    assert torch.equal(q, q.round()) and q.min() >= 0 and q.max() <= 7
    assert torch.all(_losses(result, target, objective) < before)


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
        target, objective = _problem(1, 2, 3, h_out=h_out, seed=seed)
        start = _nearest(target, 2)
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
        reached = _losses(Quantized(q.to(torch.uint8), start.scale, start.zero), target, objective)
        assert least * (1 - 1e-9) <= reached.sum() <= _losses(start, target, objective).sum()


def test_without_error_nothing_moves() -> None:
    start = _nearest(_random(2, 6, 16), 3, 4)
    target = start.dequantize()
    for h_out in (False, True):
        _, objective = _problem(2, 6, 16, h_out=h_out)
        result = _refined(start, target, objective, 3, 3)
        assert torch.equal(result.integers, start.integers)
        assert torch.equal(result.scale, start.scale) and torch.equal(result.zero, start.zero)


@KINDS
@pytest.mark.parametrize(("rows", "columns", "group", "bits"), [(2, 3, 3, 2), (4, 12, 12, 2), (4, 12, 4, 3)])
def test_no_single_integer_improves_what_converged(
    rows: int, columns: int, group: int, bits: int, heads: int, shared: bool, h_out: bool
) -> None:
    """Every other value of every integer, by brute force."""
    for seed in range(2):
        target, objective = _problem(heads, rows, columns, h_out=h_out, shared=shared, seed=seed)
        result = _refined(_nearest(target, bits, group), target, objective, bits, 200)
        least = _losses(result, target, objective)
        for head, r, c in itertools.product(range(heads), range(rows), range(columns)):
            for other in range(2**bits):
                integers = result.integers.clone()
                integers[head, r, c] = other
                changed = Quantized(integers[head, None], result.scale[head, None], result.zero[head, None])
                own = Objective(
                    objective.h_in if len(objective.h_in) == 1 else objective.h_in[head, None],
                    None if objective.h_out is None else objective.h_out[head, None],
                )
                assert _losses(changed, target[head, None], own)[0] >= least[head] / SLACK


@pytest.mark.parametrize("seed", range(3))
def test_no_neighbouring_scale_improves_what_converged(seed: int) -> None:
    """One scale a row, rows independent: the next float16 up and the next down are both worse."""
    target, objective = _problem(1, 8, 16, h_out=False, seed=seed)
    result = _refined(_nearest(target, 3), target, objective, 3, 200)
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
        target, objective = _problem(1, 6, 16, h_out=True, seed=seed)
        found = _refined(_nearest(target, 4), target, objective, 4, 200)
        best, least = found, _losses(found, target, objective)[0]
        improved = True
        while improved:  # one neighbour at a time
            improved = False
            for row, direction in itertools.product(range(6), (0.0, 65504.0)):
                scale = best.scale.clone()
                scale[0, row] = torch.nextafter(scale[0, row].half(), torch.tensor(direction).half()).double()
                loss = _losses(replace(best, scale=scale), target, objective)[0]
                if loss < least / SLACK:
                    best, least, improved = replace(best, scale=scale), loss, True
        kept += not torch.equal(best.scale, found.scale)
        again = _refined(best, target, objective, 4, 1)
        assert _losses(again, target, objective)[0] <= least * SLACK
    assert kept > 0


def test_scale_is_found_where_integers_are_right() -> None:
    """Scales off by 6 %, integers right: one update finds the stored scale that the target was made with."""
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(0, 16, (2, 5, 16), generator=generator, dtype=torch.uint8)
    true = Quantized(integers, torch.full((2, 5, 1), 0.0625, dtype=torch.float64), torch.full((2, 5, 1), 8.0).double())
    target = true.dequantize()
    off = replace(true, scale=(true.scale * 1.06).half().double())
    for h_out in (False, True):
        _, objective = _problem(2, 5, 16, h_out=h_out)
        result = _refined(off, target, objective, 4, 1)
        assert torch.equal(result.scale, true.scale) and torch.equal(result.integers, true.integers)


@pytest.mark.parametrize("h_out", [False, True])
def test_rows_of_zeros(h_out: bool) -> None:
    """A row, and a head, without weights: integers at the zero point, which no scale moves."""
    target, objective = _problem(3, 6, 16, h_out=h_out)
    target[0, 2] = 0
    target[1] = 0
    start = _nearest(target, 3)
    result = _refined(start, target, objective, 3, 5)
    _check(result, 3)
    assert torch.isfinite(result.dequantize()).all()
    assert result.dequantize()[1].abs().max() == 0
    if not h_out:
        assert result.dequantize()[0, 2].abs().max() == 0
    assert torch.all(_losses(result, target, objective) <= _losses(start, target, objective) * SLACK)


def test_what_is_given_is_not_written_to() -> None:
    target, objective = _problem(2, 6, 16, h_out=True)
    start = _nearest(target, 3)
    assert objective.h_out is not None
    given = (target, start.integers, start.scale, start.zero, objective.h_in, objective.h_out)
    copies = [tensor.clone() for tensor in given]
    result = _refined(start, target, objective, 3, 3)
    assert not torch.equal(result.integers, start.integers)
    assert all(torch.equal(*pair) for pair in zip(copies, given, strict=True))


def test_no_rounds() -> None:
    target, objective = _problem(2, 6, 16, h_out=True)
    scale, zero = search(target, None, GridSettings(3))
    integers = round_to(target, scale[..., None], zero[..., None], 7).to(torch.uint8)
    result = refine(target, integers, scale[..., None], zero[..., None], objective, 3, rounds=0)
    assert torch.equal(result[0], integers) and torch.equal(result[1], scale[..., None])
