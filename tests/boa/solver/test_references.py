"""Losses of RTN and plain GPTQ on a run's objective, against the formula in float64."""

import pytest
import torch

from rotoboa.boa.objective.objective import Objective
from rotoboa.boa.solver.references import PLAIN, reference_sums, relative_losses
from rotoboa.boa.solver.rounding import Quantized, quantize
from rotoboa.boa.solver.rounding_settings import Settings

HEADS, ROWS, COLUMNS = 3, 4, 16
SETTINGS = Settings(bits=3, refine=2, starts=2)


def objective() -> Objective:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(COLUMNS, 64, generator=draw), torch.randn(HEADS, ROWS, 32, generator=draw)
    drift = torch.randn(HEADS, ROWS, COLUMNS, generator=draw)
    return Objective((x @ x.T)[None], y @ y.transpose(1, 2), drift=drift)


def loss(result: Quantized, weight: torch.Tensor, goal: Objective, heads: slice) -> float:
    """tr(H_out E H_in E^T) over that of a zero weight, summed over heads, one trace after another in float64."""
    damped = goal.damped(SETTINGS.damping)
    assert damped.h_out is not None and goal.drift is not None
    h_in = damped.h_in[0].double()
    target = weight.double() + goal.drift.double() @ h_in.inverse()
    total = whole = 0.0
    for head in range(HEADS)[heads]:
        error = result.dequantize()[head].double() - target[head]
        total += float((damped.h_out[head] @ error @ h_in @ error.T).trace())
        whole += float((damped.h_out[head] @ target[head] @ h_in @ target[head].T).trace())
    return total / whole


def test_reference_losses() -> None:
    goal, weight = objective(), torch.randn(HEADS, ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    result = quantize(weight, goal, SETTINGS)
    plain = SETTINGS.but(**PLAIN)
    rounded = {
        "quantized": result,
        "gptq": quantize(weight, goal, plain.but(method="gptq")),
        "rtn": quantize(weight, None, plain.but(method="rtn")),
    }
    found = relative_losses(reference_sums(weight, goal, SETTINGS, result), [2, 1])
    assert len(found) == 2
    for losses, heads in zip(found, (slice(0, 2), slice(2, 3)), strict=True):
        assert list(losses) == list(rounded)
        for name, value in losses.items():
            assert value == pytest.approx(loss(rounded[name], weight, goal, heads), rel=1e-4)
        assert losses["quantized"] < losses["gptq"] < losses["rtn"]


@pytest.mark.parametrize("by_rows", [False, True])
def test_what_the_objective_does_not_see_counts_nothing(by_rows: bool) -> None:
    """Weights of dead channels, which RTN keeps and the others drop, and rows that nothing reads."""
    draw = torch.Generator().manual_seed(0)
    heads = 1 if by_rows else HEADS
    x, y = torch.randn(COLUMNS, 64, generator=draw), torch.randn(heads, ROWS, 32, generator=draw)
    x[3] = 0
    y[0, 1] = 0
    goal = Objective((x @ x.T)[None], None if by_rows else y @ y.transpose(1, 2))
    weight = torch.randn(heads, ROWS, COLUMNS, generator=draw)
    weight[..., 3] *= 10
    weight[0, 1] *= 10
    settings = SETTINGS.but(bits=8, damping=1e-6)
    result, kept = quantize(weight, goal, settings), weight.clone()
    sums = reference_sums(weight, goal, settings, result, by_rows=by_rows)
    (found,) = relative_losses(sums, [ROWS if by_rows else heads])

    def true(error: torch.Tensor) -> float:
        """tr(H_out E X X^T E^T), without damping."""
        written = (error @ x).double()
        out = torch.eye(ROWS, dtype=torch.float64) if goal.h_out is None else goal.h_out.double()
        return float((out @ written * written).sum())

    assert found["quantized"] == pytest.approx(true(result.dequantize() - weight) / true(weight), rel=1e-3)
    assert found["quantized"] < found["rtn"] < 1e-3
    assert torch.equal(weight, kept)
