"""Learned rounding: its gradient against autograd and finite differences, its promises on random problems."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rotoboa.boa.objective.objective import Objective
from rotoboa.boa.solver.grid import GridSettings
from rotoboa.boa.solver.learned import Learning, Relaxed, beside, learn, penalty_slope, rectified, slope_, variables
from rotoboa.boa.solver.refine import refine, rescale
from rotoboa.boa.solver.rounding import Quantized, objective_rows, quantize
from rotoboa.boa.solver.rounding_settings import Settings

from ..problems import check_stored, problem, random

SHORT = Learning(iterations=200, rate=0.05)


KINDS = pytest.mark.parametrize(
    ("heads", "shared", "h_out"),
    [(1, True, False), (3, False, False), (3, False, True), (3, True, True), (3, True, False)],
)


def _problem(heads: int, shared: bool, h_out: bool, rows: int = 6, columns: int = 16) -> tuple[Tensor, Objective]:
    """A weight, and an objective whose target is elsewhere."""
    weight, objective = problem(heads, rows, columns, shared=shared, h_out=h_out)
    residual = 3 * random(len(objective.h_in), columns, columns, seed=4)
    return weight, replace(objective, residual=residual, drift=5 * random(heads, rows, columns, seed=5))


def _start(heads: int, shared: bool, h_out: bool, settings: Settings) -> tuple[Tensor, Quantized, Objective]:
    weight, objective = _problem(heads, shared, h_out)
    result = quantize(weight, objective, settings)
    damped = objective.damped(settings.damping)
    return damped.target(weight, settings.alpha), result, replace(damped, residual=None, drift=None)


def _relaxed(target: Tensor, start: Quantized, objective: Objective, bits: int) -> Relaxed:
    scale, zero = start.scale.double(), start.zero.double()
    return Relaxed(target, start.integers, scale, zero, objective.h_in, objective.h_out, 2**bits - 1)


# the pieces


def test_rectified_and_its_inverse() -> None:
    h = torch.linspace(0, 1, 21, dtype=torch.float64)
    torch.testing.assert_close(rectified(variables(h)), h.clamp(0.01, 0.99), rtol=0, atol=1e-12)
    far = torch.tensor([-50.0, -2.4, 2.4, 50.0], dtype=torch.float64)  # the ends are reached, not only neared
    assert torch.equal(rectified(far), torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("beta", [20.0, 7.3, 2.0])
def test_slopes_against_autograd_and_differences(beta: float) -> None:
    v = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    h = (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)
    (slope,) = torch.autograd.grad(h.sum(), v)
    torch.testing.assert_close(slope_(h.detach().clone()), slope, rtol=1e-12, atol=1e-14)

    def penalty(h: Tensor) -> Tensor:
        return (1 - (2 * h - 1).abs() ** beta).sum()

    h = h.detach().requires_grad_()
    (slope,) = torch.autograd.grad(penalty(h), h)
    torch.testing.assert_close(penalty_slope(h.detach(), beta), slope, rtol=1e-12, atol=1e-14)
    step, inner = 1e-6, h.detach()[(h > 1e-3) & (h < 1 - 1e-3)]
    for at in inner:
        difference = (penalty(at + step) - penalty(at - step)) / (2 * step)
        torch.testing.assert_close(penalty_slope(at[None], beta)[0], difference, rtol=1e-5, atol=1e-8)


def test_schedule() -> None:
    learning = Learning(iterations=100)
    betas = [learning.beta(k) for k in range(100)]
    assert betas[:30] == [None] * 30 and betas[30] == 20 and betas[-1] == pytest.approx(2)
    falling = [beta for beta in betas if beta is not None]
    assert falling == sorted(falling, reverse=True)
    for iterations in (1, 2, 3):
        assert Learning(iterations).beta(iterations - 1) in (2, 20)  # the first of the only one is also its last


def test_beside() -> None:
    positions = torch.tensor([-0.2, 0.2, 1.9, 2.0, 2.9, 3.0, 3.2])
    assert beside(positions, 3).tolist() == [0, 0, 1, 2, 2, 2, 2]


@KINDS
@pytest.mark.parametrize("group", [None, 4])
def test_gradient_against_autograd_and_differences(group: int | None, heads: int, shared: bool, h_out: bool) -> None:
    """Of the objective, written as the trace it is, and the regulariser."""
    settings = Settings(bits=2, group_size=group, starts=1, tabu=0, refine=2)
    target, start, objective = _start(heads, shared, h_out, settings)
    relaxed = _relaxed(target, start, objective, 2)
    scale, zero = (part.double().repeat_interleave(group or 16, -1) for part in (start.scale, start.zero))

    def value(v: Tensor, beta: float | None) -> Tensor:
        h = (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)
        error = scale * (relaxed.base + h - zero) - target
        total = v.new_zeros(())
        for i in range(heads):
            h_in = objective.h_in[0 if shared else i]
            diagonal, e = h_in.diagonal(), error[i]
            if objective.h_out is None:
                for r in range(len(e)):  # each row in its own units
                    total = total + e[r] @ h_in @ e[r] / (scale[i, r] ** 2 * diagonal).mean()
            else:
                out = objective.h_out[i]
                unit = (scale[i] ** 2 * diagonal * out.diagonal()[:, None]).mean()
                total = total + torch.trace(out @ e @ h_in @ e.T) / unit
        return total if beta is None else total + 1.5 * (1 - (2 * h - 1).abs() ** beta).sum()

    v = 1.5 * random(*target.shape, seed=9)  # some of it where h is cut off
    for beta in (None, 6.5, 2.0):
        v.requires_grad_()
        (expected,) = torch.autograd.grad(value(v, beta), v)
        v = v.detach()
        found = relaxed.gradient(rectified(v), beta, 1.5)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        step = 1e-6
        for index in ((0, 0, 0), (0, 3, 7), (heads - 1, 5, 15)):
            moved = [v.clone(), v.clone()]
            moved[0][index] += step
            moved[1][index] -= step
            difference = (value(moved[0], beta) - value(moved[1], beta)) / (2 * step)
            torch.testing.assert_close(found[index], difference, rtol=1e-5, atol=1e-6)


# the start


@KINDS
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_start_is_what_no_step_rounds_to(bits: int, symmetric: bool, heads: int, shared: bool, h_out: bool) -> None:
    """Its integers are among the two of each weight, the nearer one; both are on the grid."""
    settings = Settings(bits=bits, symmetric=symmetric, starts=1, tabu=0, refine=2)
    target, start, objective = _start(heads, shared, h_out, settings)
    relaxed = _relaxed(target, start, objective, bits)
    assert relaxed.base.min() >= 0 and relaxed.base.max() <= 2**bits - 2
    h = rectified(relaxed.v)
    assert torch.equal(relaxed.base + (h >= 0.5), start.integers.double())
    assert h.min() > 0 and h.max() < 1, "a variable would start where no gradient reaches it"
    # The other integer is on the side where the objective falls.
    slope = objective.gradient(start.dequantize().double() - target) * start.scale
    at = start.integers.double()
    side = torch.where(relaxed.base < at, -1.0, 1.0)
    inside = (at > 0) & (at < 2**bits - 1) & (slope != 0)
    assert torch.equal(side[inside], -slope[inside].sign().to(side.dtype))


# the result


@KINDS
@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize(("method", "start"), [("aespa", "boa"), ("adaround", "gptq")])
def test_never_worse(method: str, start: str, group: int | None, heads: int, shared: bool, h_out: bool) -> None:
    """By row or by head; and on the whole better than a start that is refined as far as it goes."""
    weight, objective = _problem(heads, shared, h_out)
    settings = Settings(bits=2, group_size=group, tabu=0, damping=0.01, iterations=200, learning_rate=0.05)
    settings = settings.but(method=start)
    first = quantize(weight, objective, settings)
    result = quantize(weight, objective, settings.but(method=method))
    judged = objective.damped(settings.damping)
    target = judged.target(weight, settings.alpha)
    judged = replace(judged, h_out=None if method == "adaround" else judged.h_out)
    before, after = (objective_rows(judged, found, target) for found in (first, result))
    assert torch.all(after <= before * (1 + 1e-12))
    assert after.sum() < 0.99 * before.sum()
    assert result.loss == pytest.approx(float(after.sum()))
    check_stored(result, 2)


@pytest.mark.parametrize("h_out", [False, True])
def test_without_refinement(h_out: bool) -> None:
    """Learned rounding and closed-form scales alone."""
    weight, objective = _problem(3, True, h_out)
    settings = Settings(bits=2, method="boa", refine=0, starts=1, tabu=0, iterations=200, learning_rate=0.05)
    first = quantize(weight, objective, settings)
    result = quantize(weight, objective, settings.but(method="aespa"))
    assert first.loss is not None and result.loss is not None and result.loss < 0.9 * first.loss


@pytest.mark.parametrize("h_out", [False, True])
def test_rescale(h_out: bool) -> None:
    """The scales that refinement ends with, where it moves no integer."""
    target, start, objective = _start(2, True, h_out, Settings(bits=3, refine=50, starts=1, tabu=0))
    wide = (start.scale.double() * 1.1).half().double()
    scale = rescale(target, start.integers, wide, start.zero, objective, GridSettings(3))
    losses = [
        float(objective.loss(Quantized(start.integers, s, start.zero).dequantize() - target).sum())
        for s in (wide, scale)
    ]
    assert losses[1] < losses[0] and torch.equal(scale, scale.half().double())
    assert not torch.equal(wide, scale)


def test_heads_are_problems_of_their_own() -> None:
    """Learned together or one after another: the same integers."""
    target, start, objective = _start(3, False, True, Settings(bits=2, starts=1, tabu=0, refine=2))
    parts = (target, start.integers, start.scale.double(), start.zero.double())
    together = learn(*parts, objective, GridSettings(2), SHORT)
    for i in range(3):
        own = Objective(objective.h_in[i, None], None if objective.h_out is None else objective.h_out[i, None])
        weight, integers, scale, zero = (part[i, None] for part in parts)
        alone = learn(weight, integers, scale, zero, own, GridSettings(2), SHORT)
        assert torch.equal(together[i], alone[0])


def test_rows_are_problems_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few of them are learned at a time."""
    target, start, objective = _start(3, True, False, Settings(bits=2, starts=1, tabu=0, refine=2))
    arguments = (target, start.integers, start.scale.double(), start.zero.double(), objective, GridSettings(2), SHORT)
    whole = learn(*arguments)
    monkeypatch.setattr("rotoboa.boa.solver.learned._CHUNK", {"cpu": 5 * 16})
    assert torch.equal(learn(*arguments), whole)


def test_what_is_learned_is_settled() -> None:
    """At the end of the schedule hardly a variable is between its integers: rounding them changes little."""
    target, start, objective = _start(1, True, False, Settings(bits=2, starts=1, tabu=0, refine=2, damping=0.01))
    relaxed, learning = _relaxed(target, start, objective, 2), Learning(iterations=600, rate=0.05)
    optimizer = torch.optim.Adam([relaxed.v], lr=learning.rate)
    for iteration in range(learning.iterations):
        relaxed.v.grad = relaxed.gradient(rectified(relaxed.v), learning.beta(iteration), learning.regulariser).clone()
        optimizer.step()
    h = rectified(relaxed.v)
    assert ((h > 0.05) & (h < 0.95)).double().mean() < 0.02


def test_dead_channels_and_zero_rows() -> None:
    weight, objective = _problem(2, True, False)
    h_in = objective.h_in.clone()
    h_in[:, 3], h_in[:, :, 3] = 0, 0
    weight[0, 2] = 0
    settings = Settings(bits=2, method="aespa", iterations=50, starts=1, tabu=0, refine=2)
    result = quantize(weight, Objective(h_in), settings).dequantize()
    assert result.isfinite().all() and not result[..., 3].any() and not result[0, 2].any()
    nothing = quantize(weight.float(), Objective(torch.zeros_like(h_in)), settings)
    assert not nothing.dequantize().any()


def test_start_equals_refined_input() -> None:
    """`refine` of what was learned keeps the promise of both: the objective only falls."""
    target, start, objective = _start(2, True, True, Settings(bits=2, starts=1, tabu=0, refine=2))
    arguments = (start.scale.double(), start.zero.double())
    integers = learn(target, start.integers, *arguments, objective, GridSettings(2), SHORT)
    refined = Quantized(*refine(target, integers, *arguments, objective, GridSettings(2), rounds=4))
    before, after = (
        objective.loss(result.dequantize() - target) for result in (Quantized(integers, *arguments), refined)
    )
    assert torch.all(after <= before * (1 + 1e-10))
