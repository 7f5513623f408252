"""The quadratic form, its damping and its target, against dense linear algebra in float64."""

import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rotoboa.boa.objective import objective
from rotoboa.boa.objective.objective import Objective, inverse_factor, symmetrize
from rotoboa.boa.objective.statistics import InputStatistics

from ..problems import problem, random, random_gram

HEADS, ROWS, COLUMNS = 3, 4, 6


def _objective(*, shared: bool = False, h_out: bool = True) -> Objective:
    return problem(HEADS, ROWS, COLUMNS, shared=shared, h_out=h_out)[1]


# inverse_factor


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_inverse_factor(size: int) -> None:
    h = random_gram(3, size=size)
    upper = inverse_factor(h)
    assert torch.equal(upper, upper.triu()) and upper.diagonal(dim1=-2, dim2=-1).min() > 0
    inverse = torch.linalg.inv(h)
    torch.testing.assert_close(
        upper.transpose(-1, -2) @ upper, inverse, rtol=0, atol=1e-10 * float(inverse.abs().max())
    )
    # The factor of that sign is unique.
    expected = torch.linalg.cholesky(inverse, upper=True)
    torch.testing.assert_close(upper, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


def test_inverse_factor_of_an_ill_conditioned_matrix() -> None:
    """Condition 1e8, where the inverse itself has 8 digits: U must still whiten h, U h U^T = I."""
    q, _ = torch.linalg.qr(random(30, 30))
    h = (q * torch.logspace(0, 8, 30, dtype=torch.float64)) @ q.T
    upper = inverse_factor(h[None])[0]
    torch.testing.assert_close(upper @ h @ upper.T, torch.eye(30, dtype=torch.float64), rtol=0, atol=1e-6)


def test_large_matrices_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    h = random_gram(2, size=40)
    whole = inverse_factor(h)
    monkeypatch.setattr(objective, "TRIANGLE", 7)
    torch.testing.assert_close(inverse_factor(h), whole, rtol=0, atol=1e-12 * float(whole.abs().max()))
    uneven = random(2, 40, 40)
    expected = (uneven + uneven.transpose(-1, -2)) / 2
    symmetrize(uneven)
    assert torch.equal(uneven, expected)


PEAKS = """
import resource, sys
sys.argv[0] = "rotoboa"  # as the command line, which imports no more than it needs
import torch
from rotoboa.boa.objective import objective
from rotoboa.boa.objective.objective import Objective, inverse_factor
objective.TRIANGLE = 128
n, heads = 2048, 8
copy = n * n * 8
x = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
h_in = (x.T @ x)[None]
weight = torch.randn(heads, 8, n, generator=torch.Generator().manual_seed(1))
del x
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small = Objective(h_in[:, :64, :64], drift=weight[..., :64]).damped(0.01)
small.target(weight[..., :64])
inverse_factor(small.h_in)
filler = torch.ones(copy // 4)  # what has been freed so far is in use, or does not count
start = peak()
damped = Objective(h_in, drift=weight).damped(0.01)
print((peak() - start) / copy)
damped.target(weight)
print((peak() - start) / copy)
inverse_factor(damped.h_in)
print((peak() - start) / copy)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_how_many_hessians_are_held() -> None:
    """The damped one and a Cholesky factor (two while it is inverted), in float64, however many heads share them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True, env=environment)
    damped, target, inverse = map(float, done.stdout.split())
    assert damped < 2.5 and target < 2.5 and inverse < 3.5


# damping


def damp(h: Tensor, fraction: float) -> Tensor:
    return Objective(h).damped(fraction).h_in


@pytest.mark.parametrize("fraction", [0.01, 0.1, 1.0])
def test_damping_is_relative_to_the_mean_diagonal_of_each(fraction: float) -> None:
    h = random_gram(2, size=5) * torch.tensor([1.0, 1e4], dtype=torch.float64)[:, None, None]
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)
    expected = h + fraction * mean[:, None, None] * torch.eye(5, dtype=torch.float64)
    given = h.clone()
    torch.testing.assert_close(damp(h, fraction), expected, rtol=1e-14, atol=0)
    assert torch.equal(h, given)


def test_damped_is_in_float64_and_symmetric() -> None:
    h = random_gram(1, size=5).float()
    h[0, 0, 1] += 1e-3  # a sum of float32 products need not come out symmetric
    damped = damp(h, 0.01)
    assert damped.dtype == torch.float64 and torch.equal(damped, damped.transpose(-1, -2))
    assert damped[0, 0, 1] == (h[0, 0, 1].double() + h[0, 1, 0].double()) / 2


def test_dead_channels_are_left_alone() -> None:
    """A channel that is never active gets the mean diagonal, and has no say in any other."""
    x = random(5, 20)
    x[2] = 0
    h = (x @ x.T)[None]
    damped = damp(h, 0.01)
    mean = h[0].diagonal().mean()
    torch.testing.assert_close(damped[0, 2], mean * torch.eye(5, dtype=torch.float64)[2])
    upper = inverse_factor(damped)[0]
    assert torch.all(upper[2, 3:] == 0) and torch.all(upper[:2, 2] == 0)
    living = [0, 1, 3, 4]
    expected = h[0][living][:, living] + 0.01 * mean * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(damped[0][living][:, living], expected)


def test_nothing_active_at_all() -> None:
    assert (damp(torch.zeros(2, 4, 4), 0.01).diagonal(dim1=-2, dim2=-1) > 0).all()


def test_damping_rises_where_cholesky_fails(caplog: pytest.LogCaptureFixture) -> None:
    """Eigenvalues 1, 1 and -0.05 have the mean 0.65: 1 % of it is not enough, 10 % is."""
    q, _ = torch.linalg.qr(random(3, 3))
    h = (q * torch.tensor([1.0, 1.0, -0.05], dtype=torch.float64)) @ q.T
    with caplog.at_level(logging.WARNING, logger="rotoboa"):
        damped = damp(h[None], 0.01)
    torch.testing.assert_close(damped[0], h + 0.1 * 0.65 * torch.eye(3, dtype=torch.float64))
    torch.linalg.cholesky(damped)
    assert len(caplog.records) == 1 and "0.1 of the mean diagonal" in caplog.text


def test_enough_damping_is_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="rotoboa"):
        damp(random_gram(2, size=4), 0.01)
    assert not caplog.records


def test_hopelessly_indefinite() -> None:
    h = torch.tensor([[[1e-9, 1.0], [1.0, 1e-9]]])
    with pytest.raises(ValueError, match="indefinite"):
        damp(h, 0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (0, 3)])
def test_not_finite(place: tuple[int, int], value: float) -> None:
    h = random_gram(2, size=4)
    h[1][place] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        damp(h, 0.01)


def test_both_sides_are_damped() -> None:
    objective = _objective()
    assert objective.h_out is not None
    damped = objective.damped(0.1)
    assert damped.h_out is not None
    assert torch.equal(damped.h_in, damp(objective.h_in, 0.1)) and torch.equal(damped.h_out, damp(objective.h_out, 0.1))
    assert _objective(h_out=False).damped(0.1).h_out is None


# loss


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("h_out", [False, True])
def test_loss_is_the_kronecker_form(h_out: bool, shared: bool) -> None:
    """The quadratic form of H_in kron H_out in vec(E), which stacks the columns of E."""
    objective, error = _objective(shared=shared, h_out=h_out), random(HEADS, ROWS, COLUMNS, seed=3)
    loss, gradient = objective.loss(error), objective.gradient(error)
    assert loss.shape == (HEADS,) and gradient.shape == error.shape
    for head in range(HEADS):
        left = objective.h_in[0 if shared else head]
        right = torch.eye(ROWS, dtype=torch.float64) if objective.h_out is None else objective.h_out[head]
        hessian, vec = torch.kron(left, right), error[head].T.flatten()
        torch.testing.assert_close(loss[head], vec @ hessian @ vec, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient[head].T.flatten(), hessian @ vec, rtol=1e-11, atol=1e-11)


def test_loss_of_float32_errors_stays_in_float32() -> None:
    objective, error = _objective(), random(HEADS, ROWS, COLUMNS)
    assert objective.loss(error.float()).dtype == torch.float32
    torch.testing.assert_close(objective.loss(error.float()).double(), objective.loss(error), rtol=1e-5, atol=0)


# target


WEIGHT = random(1, ROWS, COLUMNS, seed=7)


def _streams() -> tuple[Tensor, Tensor, Tensor]:
    """(2, 10, c) of both streams, and what a residual stream of ROWS lost."""
    quantized = random(2, 10, COLUMNS, seed=4)
    full = quantized + 0.3 * random(2, 10, COLUMNS, seed=5)
    return full, quantized, random(2, 10, ROWS, seed=6)


def _collected(*, drift: bool) -> Objective:
    """In two batches, from what both streams give the layer, or from what it should put out."""
    full, quantized, lost = _streams()
    statistics = InputStatistics()
    for xf, xq, d in zip(full, quantized, lost, strict=True):
        if drift:
            statistics.add(None, xq, xf @ WEIGHT[0].T + d)
        else:
            statistics.add(xf, xq)
    return replace(statistics.objective(WEIGHT[0]), tokens=None)  # as if they were enough


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("fraction", [1e-6, 0.01, 0.5])
def test_target_is_the_least_squares_solution(fraction: float, drift: bool) -> None:
    """Damping by m: argmin ||W X_f + D - Q X_q||^2 + m ||Q - W||^2, solved as one least-squares problem."""
    objective, weight = _collected(drift=drift), WEIGHT
    target = objective.damped(fraction).target(weight)

    full, quantized, lost = _streams()
    xf, xq = full.flatten(0, 1), quantized.flatten(0, 1)
    wanted = xf @ weight[0].T + (lost.flatten(0, 1) if drift else 0)
    root = (fraction * float(objective.h_in.diagonal(dim1=-2, dim2=-1).mean())) ** 0.5
    stacked = torch.cat([xq, root * torch.eye(COLUMNS, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, torch.cat([wanted, root * weight[0].T])).solution.T
    torch.testing.assert_close(target[0], expected, rtol=0, atol=1e-10)
    assert (target - weight).abs().max() > 0.01


@pytest.mark.parametrize("h_out", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_target_completes_the_square(shared: bool, h_out: bool) -> None:
    """With H_out on both sides, E - S takes the place of E up to a constant, S = (W R + drift) H_in^-1."""
    objective = _objective(shared=shared, h_out=h_out)
    weight = random(HEADS, ROWS, COLUMNS, seed=8)
    residual = random(len(objective.h_in), COLUMNS, COLUMNS, seed=9)
    drift = random(HEADS, ROWS, COLUMNS, seed=10)
    target = Objective(objective.h_in, objective.h_out, residual, drift).target(weight)
    outer = torch.eye(ROWS, dtype=torch.float64) if objective.h_out is None else objective.h_out
    constants = []
    for seed in range(4):
        error = random(HEADS, ROWS, COLUMNS, seed=20 + seed) * seed  # zero first
        linear = ((outer @ (weight @ residual + drift)) * error).sum((-1, -2))
        constants.append(objective.loss(error) - 2 * linear - objective.loss(weight + error - target))
    for constant in constants[1:]:
        torch.testing.assert_close(constant, constants[0], rtol=1e-11, atol=0)


def test_alpha() -> None:
    objective, weight = _collected(drift=True).damped(0.01), WEIGHT
    whole = objective.target(weight)
    assert torch.equal(objective.target(weight, 0), weight)
    torch.testing.assert_close(objective.target(weight, 0.25), weight + 0.25 * (whole - weight), rtol=1e-13, atol=1e-13)


def test_target_without_residual_is_the_weight() -> None:
    weight = random(HEADS, ROWS, COLUMNS)
    assert torch.equal(_objective().target(weight), weight)
    assert _objective().target(weight.float()).dtype == torch.float32


def test_target_keeps_the_dtype_of_the_weight() -> None:
    objective, weight = _collected(drift=True).damped(0.01), WEIGHT
    target = objective.target(weight.float())
    assert target.dtype == torch.float32
    torch.testing.assert_close(target.double(), objective.target(weight), rtol=1e-5, atol=1e-5)
