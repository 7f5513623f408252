"""What rounding promises: levels and ranges, what every lever gains, targets, dead channels, and what is refused."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rotoboa.boa.objective.objective import Objective
from rotoboa.boa.objective.statistics import InputStatistics
from rotoboa.boa.solver.grid import search
from rotoboa.boa.solver.rounding import Quantized, quantize
from rotoboa.boa.solver.rounding_settings import Settings

from ..problems import PLAIN, check_stored, dense_losses, problem, random, same


def _loss(result: Quantized, target: Tensor, objective: Objective) -> Tensor:
    """Of each head, on the damped objective, densely."""
    return dense_losses(result, target, objective.damped(PLAIN.damping))


# properties


@pytest.mark.parametrize("group_size", [None, 6])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rtn_is_the_nearest_level(symmetric: bool, group_size: int | None) -> None:
    weight, objective = problem(2, 5, 24)
    settings = PLAIN.but(method="rtn", symmetric=symmetric, group_size=group_size)
    result = quantize(weight, objective, settings)
    assert result.scale.shape == result.zero.shape == (2, 5, 24 // (group_size or 24))
    dequantized = result.dequantize()
    for h, r, c in itertools.product(range(2), range(5), range(24)):
        g = c // (group_size or 24)
        scale, zero = float(result.scale[h, r, g]), float(result.zero[h, r, g])
        distances = [abs(scale * (i - zero) - float(weight[h, r, c])) for i in range(8)]
        assert distances[int(result.integers[h, r, c])] == min(distances)
        assert float(dequantized[h, r, c]) == scale * (int(result.integers[h, r, c]) - zero)
    same(quantize(weight, None, settings.but(method="boa")), result)
    # The grid is searched for the plain error, group by group.
    width = group_size or 24
    for g in range(24 // width):
        scales, zeros = search(weight[..., g * width : (g + 1) * width], None, settings.grid_settings)
        assert torch.equal(scales, result.scale[..., g]) and torch.equal(zeros, result.zero[..., g])


@pytest.mark.parametrize("method", ["boa", "gptq"])
@pytest.mark.parametrize("group_size", [None, 6])
@pytest.mark.parametrize("act_order", [False, True])
def test_identity_is_rtn(act_order: bool, group_size: int | None, method: str) -> None:
    weight, eye = random(2, 5, 24), torch.eye(24, dtype=torch.float64)
    objective = Objective(eye[None].repeat(2, 1, 1), torch.eye(5, dtype=torch.float64).repeat(2, 1, 1))
    settings = PLAIN.but(method=method, act_order=act_order, group_size=group_size)
    same(quantize(weight, objective, settings), quantize(weight, None, settings.but(method="rtn")))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("method", ["rtn", "gptq", "boa"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_range(symmetric: bool, method: str, bits: int) -> None:
    """Of integers and zero points; scales as they are stored; the more bits, the less is lost."""
    weight, objective = problem(2, 8, 24)
    settings = Settings(bits=bits, symmetric=symmetric, group_size=8, starts=3).but(method=method)
    result = quantize(weight.float(), objective, settings)
    check_stored(result, bits)
    assert result.integers.shape == weight.shape and result.scale.dtype == torch.float32
    assert result.scale.shape == result.zero.shape == (2, 8, 3)
    if symmetric:
        assert torch.all(result.zero == 2 ** (bits - 1))
    finer = quantize(weight.float(), objective, settings.but(bits=bits + 1)) if bits < 8 else None
    if finer is not None:
        assert _loss(finer, weight, objective).sum() < _loss(result, weight, objective).sum()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", [2, 4])
def test_each_method_beats_the_last_on_the_objective(bits: int, group_size: int | None, symmetric: bool) -> None:
    losses = torch.zeros(4, dtype=torch.float64)
    for seed in range(3):
        weight, objective = problem(2, 16, 32, seed=seed)
        settings = PLAIN.but(bits=bits, group_size=group_size, symmetric=symmetric)
        for i, (method, refined) in enumerate((("rtn", 0), ("gptq", 0), ("boa", 0), ("boa", 4))):
            result = quantize(weight, objective, settings.but(method=method, refine=refined))
            losses[i] += _loss(result, weight, objective).sum()
    rtn, gptq, boa, refined = losses.tolist()
    assert gptq < 0.8 * rtn and boa < 0.9 * gptq and refined < 0.95 * boa


@pytest.mark.parametrize("h_out", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_restarts_never_lose(symmetric: bool, group_size: int | None, h_out: bool) -> None:
    """Every row keeps its best start, or every head where H_out ties its rows."""
    weight, objective = problem(3, 8, 24, h_out=h_out)
    gained = 0
    for refined in (0, 2):
        settings = PLAIN.but(rows=4, symmetric=symmetric, group_size=group_size, refine=refined)
        one, many = (quantize(weight, objective, settings.but(starts=starts)) for starts in (1, 5))
        damped = objective.damped(PLAIN.damping)
        losses = []
        for result in (one, many):
            error = result.dequantize() - weight
            by_row = (damped.gradient(error) * error).sum(-1)
            losses.append(by_row.sum(-1) if h_out else by_row)
            if symmetric:
                assert torch.all(result.zero == 4)
        assert torch.all(losses[1] <= losses[0] * (1 + 1e-12))
        gained += int((losses[1] < 0.999 * losses[0]).sum())
    assert gained > 0


def test_act_order_helps_where_inputs_differ_in_size() -> None:
    """It is only an order: what it takes first is what it cannot make up for later."""
    losses = torch.zeros(2, dtype=torch.float64)
    for seed in range(6):
        weight, objective = problem(1, 16, 48, h_out=False, seed=seed)
        size = torch.logspace(-1, 1, 48, dtype=torch.float64)[torch.randperm(48, generator=torch.manual_seed(seed))]
        objective = Objective(objective.h_in * size[:, None] * size)
        for i, act_order in enumerate((False, True)):
            result = quantize(weight, objective, PLAIN.but(act_order=act_order))
            losses[i] += _loss(result, weight, objective).sum()
    assert losses[1] < 0.9 * losses[0]


def test_loss_is_that_of_the_damped_objective() -> None:
    weight, objective = problem(3, 8, 24, shared=True)
    for settings in (PLAIN, PLAIN.but(refine=2, starts=3)):
        result = quantize(weight, objective, settings)
        assert result.loss == pytest.approx(float(_loss(result, weight, objective).sum()), rel=1e-12)
    assert quantize(weight, None, PLAIN.but(method="rtn")).loss is None


def test_float32_is_as_good() -> None:
    """A rounding may fall the other way, and others follow; what is lost in all is the same to 5 %."""
    weight, objective = problem(4, 16, 64)
    settings = PLAIN.but(refine=4, rows=4)
    wide, narrow = (quantize(w, objective, settings) for w in (weight, weight.float()))
    assert narrow.scale.dtype == torch.float32
    losses = [float(_loss(result, weight, objective).sum()) for result in (wide, narrow)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


# target


@pytest.mark.parametrize("method", ["boa", "gptq"])
@pytest.mark.parametrize("drift", [False, True])
def test_residual_brings_the_output_nearer(drift: bool, method: str) -> None:
    """||W X_f + D - Q X_q|| with the target moved and without, on correlated inputs."""
    x_full = random(400, 16, seed=1) @ random(16, 24, seed=2) + 0.1 * random(400, 24, seed=3)
    x_quantized = x_full + 0.3 * random(400, 24, seed=4)
    weight = random(1, 8, 24, seed=6)
    wanted = x_full @ weight[0].T
    statistics = InputStatistics()
    if drift:
        wanted = wanted + 0.3 * x_full @ random(24, 8, seed=5)
        statistics.add(None, x_quantized, wanted)
    else:
        statistics.add(x_full, x_quantized)
    errors = {}
    for alpha in (0.0, 0.5, 1.0):
        settings = PLAIN.but(bits=4, method=method, alpha=alpha, refine=2)
        result = quantize(weight, statistics.objective(weight[0]), settings)
        errors[alpha] = float((wanted - x_quantized @ result.dequantize()[0].T).norm())
    assert errors[1.0] < errors[0.5] < errors[0.0] and errors[1.0] < 0.95 * errors[0.0]


def test_solves_for_the_target() -> None:
    """With a residual, the same as without one and the weight at the target."""
    weight, objective = problem(2, 8, 24)
    residual = 0.1 * random(2, 24, 24, seed=9) * objective.h_in.diagonal(dim1=-2, dim2=-1).mean()
    moved = replace(objective, residual=residual)
    settings = PLAIN.but(refine=2, starts=3, act_order=True)
    target = moved.damped(settings.damping).target(weight, settings.alpha)
    assert (target - weight).abs().max() > 0.1
    same(quantize(weight, moved, settings), quantize(target, objective, settings))


# dead columns, and what is wrong


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("method", ["boa", "gptq"])
def test_dead_columns_become_zero(method: str, act_order: bool) -> None:
    """A channel without input gets weight 0, widens no grid, passes no error on to the others, nor takes any."""
    weight, objective = problem(2, 6, 16)
    dead = [3, 4, 15]
    alive = [c for c in range(16) if c not in dead]
    h_in = objective.h_in.clone()
    h_in[:, dead] = 0
    h_in[:, :, dead] = 0
    objective = replace(objective, h_in=h_in)
    weight[..., dead] *= 100
    settings = PLAIN.but(method=method, act_order=act_order, grid="minmax", rows=6)
    result = quantize(weight, objective, settings)
    assert torch.count_nonzero(result.dequantize()[..., dead]) == 0
    # Damping is relative to the mean diagonal of all columns: less of them, more damping.
    without = replace(objective, h_in=h_in[:, alive][:, :, alive])
    alone = quantize(weight[..., alive], without, settings.but(damping=settings.damping * len(alive) / 16))
    assert torch.equal(result.integers[..., alive], alone.integers)
    assert math.isfinite(result.loss or 0)


def test_group_size_must_divide() -> None:
    with pytest.raises(ValueError, match="group size 7 does not divide 24 columns"):
        quantize(random(1, 4, 24), None, PLAIN.but(group_size=7))


@pytest.mark.parametrize("method", ["boa", "gptq"])
def test_not_finite(method: str) -> None:
    weight, objective = problem(1, 4, 8)
    objective.h_in[0, 2, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize(weight, objective, PLAIN.but(method=method))


@pytest.mark.parametrize("shape", [(2, 8, 24), (1, 1, 24), (1, 8, 1)])
def test_what_is_given_is_not_written_to(shape: tuple[int, int, int]) -> None:
    weight, objective = problem(*shape)
    assert objective.h_out is not None
    copies = weight.clone(), objective.h_in.clone(), objective.h_out.clone()
    for settings in (PLAIN, Settings(bits=2, starts=3)):
        quantize(weight, objective, settings)
    assert all(torch.equal(*pair) for pair in zip(copies, (weight, objective.h_in, objective.h_out), strict=True))
