"""Channels that are zero in the quantized stream: what they put out in the full-precision one is made up for."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rotoboa.boa.objective.objective import Objective
from rotoboa.boa.solver.rounding import quantize
from rotoboa.boa.solver.rounding_settings import Settings

ROWS, COLUMNS, TOKENS, DAMPING = 8, 16, 500, 1e-6
LOST, NEVER = [3, 11], [5]  # dead in the quantized stream alone; in both
ALIVE = [c for c in range(COLUMNS) if c not in LOST + NEVER]


class Streams(NamedTuple):
    """Correlated inputs (channels, tokens), in full precision and quantized, and a weight (1, r, c); in float64."""

    full: Tensor
    quantized: Tensor
    weight: Tensor

    @property
    def h_in(self) -> Tensor:
        return (self.quantized @ self.quantized.T)[None]

    def objective(self, kind: str) -> Objective:
        """What the streams differ by, as R or as the drift of the outputs."""
        if kind == "residual":
            return Objective(self.h_in, residual=((self.full - self.quantized) @ self.quantized.T)[None])
        wanted = self.weight @ self.full - self.weight @ self.quantized
        return Objective(self.h_in, drift=wanted @ self.quantized.T)

    def optimum(self) -> Tensor:
        """The weight (1, r, c) on the living channels that puts out W X_f with the least squared error, damped."""
        x = self.quantized[ALIVE]
        mean = self.h_in[0].diagonal().mean()
        h_in = x @ x.T + DAMPING * mean * torch.eye(len(ALIVE), dtype=x.dtype)
        # Damping holds the weight where it was.
        kept = DAMPING * mean * self.weight[0][:, ALIVE]
        found = torch.zeros_like(self.weight)
        found[..., ALIVE] = (self.weight[0] @ self.full @ x.T + kept) @ h_in.inverse()
        return found

    def error(self, weight: Tensor) -> float:
        """Of what `weight` puts out, relative to what is wanted."""
        wanted = self.weight[0] @ self.full
        return float((wanted - weight[0].double() @ self.quantized).square().sum() / wanted.square().sum())


@pytest.fixture
def streams() -> Streams:
    draw = torch.Generator().manual_seed(0)
    mix = torch.eye(COLUMNS, dtype=torch.float64) + 0.5 * torch.randn(COLUMNS, COLUMNS, generator=draw)
    full = mix @ torch.randn(COLUMNS, TOKENS, generator=draw, dtype=torch.float64)
    full[NEVER] = 0
    quantized = (full / 0.2).round() * 0.2
    quantized[LOST] = 0
    weight = torch.randn(1, ROWS, COLUMNS, generator=draw, dtype=torch.float64)
    weight[..., NEVER] *= 100  # which would be seen in any grid, and in any other column's target
    return Streams(full, quantized, weight)


@pytest.mark.parametrize("kind", ["residual", "drift"])
@pytest.mark.parametrize("method", ["gptq", "boa"])
def test_living_channels_make_up_for_dead_ones(method: str, kind: str, streams: Streams) -> None:
    """The target is the best weight on the living channels, which is what gets rounded; dead ones become 0."""
    settings = Settings(bits=8, damping=DAMPING).but(method=method)
    found = quantize(streams.weight, streams.objective(kind), settings)
    expected = quantize(streams.optimum(), Objective(streams.h_in), settings)
    assert torch.equal(found.integers, expected.integers) and torch.equal(found.scale, expected.scale)
    weight = found.dequantize()
    assert not weight[..., LOST + NEVER].any()
    assert streams.error(weight) < 1.01 * streams.error(streams.optimum())


def test_without_compensation_dead_channels_are_left_out(streams: Streams) -> None:
    """Of alpha 0 nothing is asked but the living channels' own weights."""
    settings = Settings(bits=8, damping=DAMPING, alpha=0.0)
    masked = streams.weight.clone()
    masked[..., LOST + NEVER] = 0
    found = quantize(streams.weight, streams.objective("residual"), settings)
    expected = quantize(masked, Objective(streams.h_in), settings)
    assert torch.equal(found.integers, expected.integers) and torch.equal(found.scale, expected.scale)
