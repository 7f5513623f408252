"""The solver against error compensation on the whole Kronecker matrix, densely, in float64.

In float64 the solver and the references differ by 1e-13 at most before a rounding, so integers and scales are equal.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rotoboa.boa import rounding
from rotoboa.boa.grid import round_to, search
from rotoboa.boa.objective import Objective
from rotoboa.boa.rounding import Quantized, Settings, quantize
from rotoboa.boa.statistics import InputStatistics

# One pass of the solver and nothing after it.
PLAIN = Settings(bits=3, refine=0, starts=1, act_order=False, rows=1)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _gram(*batch: int, size: int, seed: int) -> Tensor:
    """Of correlated vectors with a few large entries, as activations have."""
    x = _random(*batch, 3 * size, size, seed=seed)
    x = (x + 0.7 * x[..., :1] + 0.7 * x.roll(1, -1)) * torch.linspace(0.3, 2, size, dtype=torch.float64)
    return x.transpose(-1, -2) @ x


def _problem(
    heads: int, rows: int, columns: int, *, shared: bool = False, h_out: bool = True, seed: int = 0
) -> tuple[Tensor, Objective]:
    h_in = _gram(1 if shared else heads, size=columns, seed=10 * seed + 1)
    return _random(heads, rows, columns, seed=10 * seed + 2), Objective(
        h_in, _gram(heads, size=rows, seed=10 * seed + 3) if h_out else None
    )


def _same(one: Quantized, other: Quantized) -> None:
    assert one.integers.shape == other.integers.shape
    assert torch.equal(one.integers, other.integers)
    assert torch.equal(one.scale, other.scale) and torch.equal(one.zero, other.zero)


def _parts(result: Quantized, head: slice) -> Quantized:
    return Quantized(result.integers[head], result.scale[head], result.zero[head])


def _loss(result: Quantized, target: Tensor, objective: Objective, damping: float = PLAIN.damping) -> Tensor:
    """Of each head, on the damped objective, densely."""
    damped, error = objective.damped(damping), result.dequantize() - target
    losses = []
    for head, e in enumerate(error):
        h_in = damped.h_in[head if len(damped.h_in) > 1 else 0]
        h_out = torch.eye(len(e), dtype=torch.float64) if damped.h_out is None else damped.h_out[head]
        losses.append(torch.trace(h_out @ e.double() @ h_in @ e.double().T))
    return torch.stack(losses)


# references


def _obs(target: Tensor, objective: Objective, settings: Settings) -> Quantized:
    """The definition: after each rounding, all weights not yet rounded are set to what then minimises the loss.

    The minimum is found by solving with the whole Kronecker matrix of a head, without any factor of it. Rounded
    together are the `rows` rows of one column. A grid is searched when its first column is reached, on the rows as
    they then are.
    """
    damped = objective.damped(settings.damping)
    heads, rows, columns = target.shape
    group = settings.group_size or columns
    result = Quantized(
        torch.zeros(heads, rows, columns, dtype=torch.uint8),
        *torch.zeros(2, heads, rows, columns // group, dtype=torch.float64),
    )
    for head in range(heads):
        h_in = damped.h_in[head if len(damped.h_in) > 1 else 0]
        h_out = torch.eye(rows, dtype=torch.float64) if damped.h_out is None else damped.h_out[head]
        h = torch.kron(h_out, h_in)  # of vec(E) that lines up the rows of E
        fixed = torch.zeros(rows, columns, dtype=torch.bool)
        error = torch.zeros(rows, columns, dtype=torch.float64)
        step = rows if damped.h_out is None else settings.rows
        for start in range(0, rows, step):
            block = slice(start, start + step)
            for i in range(columns):
                now = target[head] + error
                g, span = i // group, slice(i // group * group, (i // group + 1) * group)
                if i % group == 0:
                    found = search(now[None, block, span], h_in[None, span, span], settings.grid_settings)
                    result.scale[head, block, g], result.zero[head, block, g] = (part[0] for part in found)
                s, z = result.scale[head, block, g], result.zero[head, block, g]
                q = round_to(now[block, i], s, z, 2**settings.bits - 1)
                result.integers[head, block, i] = q.to(torch.uint8)
                error[block, i] = (q - z) * s - target[head, block, i]
                fixed[block, i] = True
                free = ~fixed.flatten()
                if free.any():
                    known = h[free][:, ~free] @ error.flatten()[~free]
                    error.view(-1)[free] = -torch.linalg.solve(h[free][:, free], known)
    return result


def _dense_gptq(target: Tensor, objective: Objective, settings: Settings) -> Quantized:
    """GPTQ as published on vec(W), row after row, of one head, by the Cholesky factor of the inverse of the whole."""
    damped = objective.damped(settings.damping)
    assert damped.h_out is not None
    rows, columns = target.shape
    upper = torch.linalg.cholesky(torch.linalg.inv(torch.kron(damped.h_out[0], damped.h_in[0])), upper=True)
    work, integers = target.flatten().clone(), torch.zeros(rows * columns, dtype=torch.uint8)
    scale, zero = torch.zeros(2, rows, dtype=torch.float64)
    for i in range(len(work)):
        r = i // columns
        if i % columns == 0:
            found = search(work[None, None, i : i + columns], damped.h_in, settings.grid_settings)
            scale[r], zero[r] = (part[0, 0] for part in found)
        q = round_to(work[i], scale[r], zero[r], 2**settings.bits - 1)
        integers[i] = int(q)
        work[i:] -= (work[i] - (q - zero[r]) * scale[r]) / upper[i, i] * upper[i, i:]
    return Quantized(integers.view(1, rows, columns), scale.view(1, rows, 1), zero.view(1, rows, 1))


def _textbook_gptq(weight: Tensor, h_in: Tensor, settings: Settings) -> Quantized:
    """GPTQ (arXiv 2210.17323) of a layer (r, c), column by column; act order as its authors' `static_groups`."""
    rows, columns = weight.shape
    group, levels = settings.group_size or columns, 2**settings.bits - 1
    h = Objective(h_in[None]).damped(settings.damping).h_in[0]
    order = h.diagonal().argsort(descending=True) if settings.act_order else torch.arange(columns)
    upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    work, integers = weight[:, order].clone(), torch.zeros(rows, columns, dtype=torch.uint8)
    scale, zero = torch.zeros(2, rows, columns // group, dtype=torch.float64)
    for place, column in enumerate(order.tolist()):
        g = column // group
        span = slice(g * group, (g + 1) * group)
        if settings.act_order and place == 0:
            for every in range(columns // group):
                part = slice(every * group, (every + 1) * group)
                found = search(weight[None, :, part], h[None, part, part], settings.grid_settings)
                scale[:, every], zero[:, every] = (x[0] for x in found)
        if not settings.act_order and column % group == 0:
            found = search(work[None, :, span], h[None, span, span], settings.grid_settings)
            scale[:, g], zero[:, g] = (x[0] for x in found)
        q = round_to(work[:, place], scale[:, g], zero[:, g], levels)
        integers[:, column] = q.to(torch.uint8)
        error = (work[:, place] - (q - zero[:, g]) * scale[:, g]) / upper[place, place]
        work[:, place:] -= error[:, None] * upper[place, place:]
    return Quantized(integers[None], scale[None], zero[None])


# equality


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (4, 6), (8, 16)])
def test_row_after_row_is_gptq_on_the_kronecker_matrix(rows: int, columns: int, bits: int, symmetric: bool) -> None:
    settings = replace(PLAIN, bits=bits, symmetric=symmetric)
    for seed in range(3):
        weight, objective = _problem(1, rows, columns, seed=seed)
        _same(quantize(weight, objective, settings), _dense_gptq(weight[0], objective, settings))


@pytest.mark.parametrize("method", ["minmax", "diagonal", "hessian"])
@pytest.mark.parametrize("group_size", [None, 4, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8])
def test_row_blocks_follow_the_definition(rows: int, group_size: int | None, method: str) -> None:
    """BoA takes one row at a time, TurboBoA several (3 of 8 leave a smaller last block), d_h of them are GPTQ's."""
    settings = replace(PLAIN, rows=rows, group_size=group_size, grid=method)
    weight, objective = _problem(2, 8, 16)
    _same(quantize(weight, objective, settings), _obs(weight, objective, settings))


@pytest.mark.parametrize("h_out", [False, True])
@pytest.mark.parametrize(("heads", "shared"), [(1, True), (3, False), (3, True)])
@pytest.mark.parametrize("rows", [1, 2])
def test_heads_follow_the_definition(rows: int, heads: int, shared: bool, h_out: bool) -> None:
    settings = replace(PLAIN, rows=rows)
    weight, objective = _problem(heads, 6, 10, shared=shared, h_out=h_out)
    _same(quantize(weight, objective, settings), _obs(weight, objective, settings))


def test_h_out_matters() -> None:
    """Or the tests above would compare GPTQ with GPTQ."""
    weight, objective = _problem(1, 8, 16)
    boa, gptq = (quantize(weight, objective, replace(PLAIN, method=method)) for method in ("boa", "gptq"))
    assert not torch.equal(boa.integers[:, 1:], gptq.integers[:, 1:])
    assert torch.equal(boa.integers[:, 0], gptq.integers[:, 0])  # nothing has moved the first row


def test_all_rows_at_once_is_gptq() -> None:
    weight, objective = _problem(2, 8, 16)
    boa, gptq = (quantize(weight, objective, replace(PLAIN, method=m, rows=8)) for m in ("boa", "gptq"))
    _same(boa, gptq)
    _same(quantize(weight, objective, replace(PLAIN, rows=100)), gptq)


@pytest.mark.parametrize("method", ["boa", "gptq"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 4, 8])
@pytest.mark.parametrize("columns", [24, 160])
def test_textbook_gptq(columns: int, group_size: int | None, act_order: bool, method: str) -> None:
    settings = replace(PLAIN, method=method, group_size=group_size, act_order=act_order)
    weight, objective = _problem(1, 12, columns, h_out=False)
    _same(quantize(weight, objective, settings), _textbook_gptq(weight[0], objective.h_in[0], settings))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 4, 150])
@pytest.mark.parametrize("h_out", [False, True])
def test_lazy_updates_change_nothing(
    h_out: bool, group_size: int | None, act_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(PLAIN, group_size=group_size, act_order=act_order, rows=4)
    weight, objective = _problem(2, 8, 300, h_out=h_out)
    lazy = quantize(weight, objective, settings)
    monkeypatch.setattr(rounding, "COLUMN_BLOCK", 1)
    _same(quantize(weight, objective, settings), lazy)


@pytest.mark.parametrize("h_out", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("shared", [False, True])
def test_heads_at_once_are_heads_one_at_a_time(
    shared: bool, group_size: int | None, act_order: bool, h_out: bool
) -> None:
    """With a round of refinement and restarts too. Without a shared H_in each head has an order of its own.

    One round: of several, heads at once stop together, when nothing moves in any of them.
    """
    settings = replace(PLAIN, group_size=group_size, act_order=act_order, rows=4, refine=1, starts=3)
    weight, objective = _problem(4, 8, 24, shared=shared, h_out=h_out)
    together = quantize(weight, objective, settings)
    total = 0.0
    for i in range(4):
        head = slice(i, i + 1)
        own = Objective(
            objective.h_in if shared else objective.h_in[head],
            None if objective.h_out is None else objective.h_out[head],
        )
        alone = quantize(weight[head], own, settings)
        _same(alone, _parts(together, head))
        assert alone.loss is not None
        total += alone.loss
    assert together.loss == pytest.approx(total, rel=1e-12)


def test_rows_are_independent_without_h_out() -> None:
    settings = replace(PLAIN, act_order=True, refine=1, starts=3)
    weight, objective = _problem(1, 9, 24, h_out=False)
    whole = quantize(weight, objective, settings)
    for part in (slice(0, 1), slice(3, 9)):
        some = quantize(weight[:, part], objective, settings)
        _same(some, Quantized(whole.integers[:, part], whole.scale[:, part], whole.zero[:, part]))


# properties


@pytest.mark.parametrize("group_size", [None, 6])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rtn_is_the_nearest_level(symmetric: bool, group_size: int | None) -> None:
    weight, objective = _problem(2, 5, 24)
    settings = replace(PLAIN, method="rtn", symmetric=symmetric, group_size=group_size)
    result = quantize(weight, objective, settings)
    assert result.scale.shape == result.zero.shape == (2, 5, 24 // (group_size or 24))
    dequantized = result.dequantize()
    for h, r, c in itertools.product(range(2), range(5), range(24)):
        g = c // (group_size or 24)
        scale, zero = float(result.scale[h, r, g]), float(result.zero[h, r, g])
        distances = [abs(scale * (i - zero) - float(weight[h, r, c])) for i in range(8)]
        assert distances[int(result.integers[h, r, c])] == min(distances)
        assert float(dequantized[h, r, c]) == scale * (int(result.integers[h, r, c]) - zero)
    _same(quantize(weight, None, replace(settings, method="boa")), result)
    # The grid is searched for the plain error, group by group.
    width = group_size or 24
    for g in range(24 // width):
        scale, zero = search(weight[..., g * width : (g + 1) * width], None, settings.grid_settings)
        assert torch.equal(scale, result.scale[..., g]) and torch.equal(zero, result.zero[..., g])


@pytest.mark.parametrize("method", ["boa", "gptq"])
@pytest.mark.parametrize("group_size", [None, 6])
@pytest.mark.parametrize("act_order", [False, True])
def test_identity_is_rtn(act_order: bool, group_size: int | None, method: str) -> None:
    weight, eye = _random(2, 5, 24), torch.eye(24, dtype=torch.float64)
    objective = Objective(eye[None].repeat(2, 1, 1), torch.eye(5, dtype=torch.float64).repeat(2, 1, 1))
    settings = replace(PLAIN, method=method, act_order=act_order, group_size=group_size)
    _same(quantize(weight, objective, settings), quantize(weight, None, replace(settings, method="rtn")))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("method", ["rtn", "gptq", "boa"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_range(symmetric: bool, method: str, bits: int) -> None:
    """Of integers and zero points; scales as they are stored; the more bits, the less is lost."""
    weight, objective = _problem(2, 8, 24)
    settings = Settings(bits=bits, method=method, symmetric=symmetric, group_size=8, starts=3)
    result = quantize(weight.float(), objective, settings)
    assert result.integers.dtype == torch.uint8 and result.integers.shape == weight.shape
    assert int(result.integers.max()) <= 2**bits - 1
    assert result.scale.shape == result.zero.shape == (2, 8, 3)
    assert torch.equal(result.zero, result.zero.round())
    assert float(result.zero.min()) >= 0 and float(result.zero.max()) <= 2**bits - 1
    if symmetric:
        assert torch.all(result.zero == 2 ** (bits - 1))
    assert torch.equal(result.scale, result.scale.half().float()) and float(result.scale.min()) > 0
    finer = quantize(weight.float(), objective, replace(settings, bits=bits + 1)) if bits < 8 else None
    if finer is not None:
        assert _loss(finer, weight, objective).sum() < _loss(result, weight, objective).sum()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_method_beats_the_last_on_the_objective(bits: int, group_size: int | None, symmetric: bool) -> None:
    losses = torch.zeros(4, dtype=torch.float64)
    for seed in range(3):
        weight, objective = _problem(2, 16, 32, seed=seed)
        settings = replace(PLAIN, bits=bits, group_size=group_size, symmetric=symmetric)
        for i, (method, refined) in enumerate((("rtn", 0), ("gptq", 0), ("boa", 0), ("boa", 4))):
            result = quantize(weight, objective, replace(settings, method=method, refine=refined))
            losses[i] += _loss(result, weight, objective).sum()
    rtn, gptq, boa, refined = losses.tolist()
    assert gptq < 0.8 * rtn and boa < 0.9 * gptq and refined < 0.95 * boa


@pytest.mark.parametrize("h_out", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_restarts_never_lose(symmetric: bool, group_size: int | None, h_out: bool) -> None:
    """Every row keeps its best start, or every head where H_out ties its rows."""
    weight, objective = _problem(3, 8, 24, h_out=h_out)
    gained = 0
    for refined in (0, 2):
        settings = replace(PLAIN, rows=4, symmetric=symmetric, group_size=group_size, refine=refined)
        one, many = (quantize(weight, objective, replace(settings, starts=starts)) for starts in (1, 5))
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
        weight, objective = _problem(1, 16, 48, h_out=False, seed=seed)
        size = torch.logspace(-1, 1, 48, dtype=torch.float64)[torch.randperm(48, generator=torch.manual_seed(seed))]
        objective = Objective(objective.h_in * size[:, None] * size)
        for i, act_order in enumerate((False, True)):
            result = quantize(weight, objective, replace(PLAIN, act_order=act_order))
            losses[i] += _loss(result, weight, objective).sum()
    assert losses[1] < 0.9 * losses[0]


def test_loss_is_that_of_the_damped_objective() -> None:
    weight, objective = _problem(3, 8, 24, shared=True)
    for settings in (PLAIN, replace(PLAIN, refine=2, starts=3)):
        result = quantize(weight, objective, settings)
        assert result.loss == pytest.approx(float(_loss(result, weight, objective).sum()), rel=1e-12)
    assert quantize(weight, None, replace(PLAIN, method="rtn")).loss is None


def test_float32_is_as_good() -> None:
    """A rounding may fall the other way, and others follow; what is lost in all is the same to 5 %."""
    weight, objective = _problem(4, 16, 64)
    settings = replace(PLAIN, refine=4, rows=4)
    wide, narrow = (quantize(w, objective, settings) for w in (weight, weight.float()))
    assert narrow.scale.dtype == torch.float32
    losses = [float(_loss(result, weight, objective).sum()) for result in (wide, narrow)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


# target


@pytest.mark.parametrize("method", ["boa", "gptq"])
@pytest.mark.parametrize("drift", [False, True])
def test_residual_brings_the_output_nearer(drift: bool, method: str) -> None:
    """||W X_f + D - Q X_q|| with the target moved and without, on correlated inputs."""
    x_full = _random(400, 16, seed=1) @ _random(16, 24, seed=2) + 0.1 * _random(400, 24, seed=3)
    x_quantized = x_full + 0.3 * _random(400, 24, seed=4)
    weight = _random(1, 8, 24, seed=6)
    wanted = x_full @ weight[0].T
    statistics = InputStatistics()
    if drift:
        wanted = wanted + 0.3 * x_full @ _random(24, 8, seed=5)
        statistics.add(None, x_quantized, wanted)
    else:
        statistics.add(x_full, x_quantized)
    errors = {}
    for alpha in (0.0, 0.5, 1.0):
        settings = replace(PLAIN, bits=4, method=method, alpha=alpha, refine=2)
        result = quantize(weight, statistics.objective(weight[0]), settings)
        errors[alpha] = float((wanted - x_quantized @ result.dequantize()[0].T).norm())
    assert errors[1.0] < errors[0.5] < errors[0.0] and errors[1.0] < 0.95 * errors[0.0]


def test_solves_for_the_target() -> None:
    """With a residual, the same as without one and the weight at the target."""
    weight, objective = _problem(2, 8, 24)
    residual = 0.1 * _random(2, 24, 24, seed=9) * objective.h_in.diagonal(dim1=-2, dim2=-1).mean()
    moved = replace(objective, residual=residual)
    settings = replace(PLAIN, refine=2, starts=3, act_order=True)
    target = moved.damped(settings.damping).target(weight, settings.alpha)
    assert (target - weight).abs().max() > 0.1
    _same(quantize(weight, moved, settings), quantize(target, objective, settings))


# dead columns, and what is wrong


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("method", ["boa", "gptq"])
def test_dead_columns_become_zero(method: str, act_order: bool) -> None:
    """A channel without input gets weight 0, widens no grid, passes no error on to the others, nor takes any."""
    weight, objective = _problem(2, 6, 16)
    dead = [3, 4, 15]
    alive = [c for c in range(16) if c not in dead]
    h_in = objective.h_in.clone()
    h_in[:, dead] = 0
    h_in[:, :, dead] = 0
    objective = replace(objective, h_in=h_in)
    weight[..., dead] *= 100
    settings = replace(PLAIN, method=method, act_order=act_order, grid="minmax", rows=6)
    result = quantize(weight, objective, settings)
    assert torch.count_nonzero(result.dequantize()[..., dead]) == 0
    # Damping is relative to the mean diagonal of all columns: less of them, more damping.
    without = replace(objective, h_in=h_in[:, alive][:, :, alive])
    alone = quantize(weight[..., alive], without, replace(settings, damping=settings.damping * len(alive) / 16))
    assert torch.equal(result.integers[..., alive], alone.integers)
    assert math.isfinite(result.loss or 0)


def test_group_size_must_divide() -> None:
    with pytest.raises(ValueError, match="group size 7 does not divide 24 columns"):
        quantize(_random(1, 4, 24), None, replace(PLAIN, group_size=7))


@pytest.mark.parametrize("method", ["boa", "gptq"])
def test_not_finite(method: str) -> None:
    weight, objective = _problem(1, 4, 8)
    objective.h_in[0, 2, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize(weight, objective, replace(PLAIN, method=method))


@pytest.mark.parametrize("shape", [(2, 8, 24), (1, 1, 24), (1, 8, 1)])
def test_what_is_given_is_not_written_to(shape: tuple[int, int, int]) -> None:
    weight, objective = _problem(*shape)
    assert objective.h_out is not None
    copies = weight.clone(), objective.h_in.clone(), objective.h_out.clone()
    for settings in (PLAIN, Settings(bits=2, starts=3)):
        quantize(weight, objective, settings)
    assert all(torch.equal(*pair) for pair in zip(copies, (weight, objective.h_in, objective.h_out), strict=True))
