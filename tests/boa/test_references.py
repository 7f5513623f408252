"""Losses of RTN and plain GPTQ on a run's objective, against the formula in float64."""

from dataclasses import replace

import pytest
import torch

from rotoboa.boa.objective import Objective
from rotoboa.boa.references import PLAIN, reference_losses
from rotoboa.boa.rounding import Quantized, Settings, quantize

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
    plain = replace(SETTINGS, **PLAIN)
    rounded = {
        "quantized": result,
        "gptq": quantize(weight, goal, replace(plain, method="gptq")),
        "rtn": quantize(weight, None, replace(plain, method="rtn")),
    }
    found = reference_losses(weight, goal, SETTINGS, result, [2, 1])
    assert len(found) == 2
    for losses, heads in zip(found, (slice(0, 2), slice(2, 3)), strict=True):
        assert list(losses) == list(rounded)
        for name, value in losses.items():
            assert value == pytest.approx(loss(rounded[name], weight, goal, heads), rel=1e-4)
        assert losses["quantized"] < losses["gptq"] < losses["rtn"]
