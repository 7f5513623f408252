"""Calibration that is too little for a layer: Hessians are shrunk, and results are no worse than RTN on other text."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rotoboa.boa.objective.objective import DEPENDENT, FEW_TOKENS, MOST_SHRUNK, Objective, shrinkage
from rotoboa.boa.objective.statistics import InputStatistics
from rotoboa.boa.solver.rounding import quantize
from rotoboa.boa.solver.rounding_settings import Settings

from ..problems import random, random_gram


def shrunk(h: Tensor, tokens: int) -> Tensor:
    found = shrinkage(h, tokens)
    assert found is not None
    return found


def test_shrinkage_follows_its_formula() -> None:
    """The Oracle Approximating Shrinkage, of S = H / n, times what dependent tokens need; none of tokens enough."""
    n, p = 9, 6
    h = random_gram(2, size=p)
    for found, one in zip(shrunk(h, n), h, strict=True):
        s = one.numpy() / n
        squares, trace = (s @ s).trace(), s.trace() ** 2
        rho = min(1, ((1 - 2 / p) * squares + trace) / ((n + 1 - 2 / p) * (squares - trace / p)))
        expected = min(MOST_SHRUNK, DEPENDENT * rho / (1 - rho)) if rho < 1 else MOST_SHRUNK
        assert float(found) == pytest.approx(expected, rel=1e-12)
    assert shrinkage(h, FEW_TOKENS * p) is None and shrinkage(h, None) is None
    assert float(shrunk(torch.eye(p)[None], 1)) == MOST_SHRUNK  # shows nothing but its mean
    low = torch.zeros(1, 64, 64)
    low[0, 0, 0] = 1
    assert float(shrunk(low, 64)) < 0.1  # a low rank is left what it shows


def test_shrinkage_is_damping_that_is_not_said_to_be_raised(caplog: pytest.LogCaptureFixture) -> None:
    h = random_gram(1, size=6)
    few, enough = Objective(h, tokens=2), Objective(h, tokens=FEW_TOKENS * 6)
    assert torch.equal(enough.damped(0.01).h_in, Objective(h).damped(0.01).h_in)
    more = shrunk(h, 2)
    assert float(more) > 0.01
    assert torch.equal(few.damped(0.01).h_in, Objective(h).damped(float(more)).h_in)
    assert few.damped(0.01).damping == 0.01 and not caplog.records


@pytest.mark.parametrize("method", ["gptq", "adaround"])
@pytest.mark.parametrize("tokens", [16, 32, 64])
def test_few_tokens_are_no_worse_than_rounding_to_nearest(tokens: int, method: str) -> None:
    """On other tokens, of 64 channels of which none stands out: where there is least to find, and most to lose."""
    channels, few, many = 64, random(tokens, 64, seed=1).float(), random(2000, 64, seed=2).float()
    spread = torch.linspace(0.5, 2, channels)
    weight = random(1, 48, channels, seed=3).float()
    statistics, held = InputStatistics(), InputStatistics()
    statistics.add(few * spread, few * spread)
    held.add(many * spread, many * spread)
    goal, settings = held.objective(), Settings(bits=4, refine=4, starts=2, tabu=1, iterations=100).but(method=method)
    seen = statistics.objective()
    assert seen.tokens == tokens

    def lost(objective: Objective | None, used: Settings) -> float:
        return float(goal.loss(quantize(weight, objective, used).dequantize() - weight).sum())

    nearest = lost(None, settings.but(method="rtn"))
    assert lost(seen, settings) < 1.02 * nearest
    if tokens < channels:  # which it would be without
        assert lost(replace(seen, tokens=None), settings) > 1.2 * nearest
