"""Scales of scales: products are found again, and a solved layer lies on the grid that is stored."""

import pytest
import torch

from rotoboa.boa import super_scales
from rotoboa.boa.objective.objective import Objective
from rotoboa.boa.scheme import TWO_LEVELS, QuantizationArgs
from rotoboa.boa.solver.rounding import quantize
from rotoboa.boa.solver.rounding_settings import Settings


def problem() -> tuple[torch.Tensor, Objective]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(1, 12, 512, generator=generator) * torch.rand(1, 12, 1, generator=generator)
    x = torch.randn(2000, 512, generator=generator) @ torch.randn(512, 512, generator=generator)
    return weight, Objective((x.T @ x).double()[None] / 2000)


@pytest.mark.parametrize("top", [63, 127])
def test_factors_are_found_again(top: int) -> None:
    generator = torch.Generator().manual_seed(top)
    d = (torch.rand(40, 2, generator=generator) * 1e-3).half().float()
    q = torch.randint(top + 1, (40, 2, 8), generator=generator).float()
    d[0] = 0
    products = (d[..., None] * q).flatten(1)
    found_d, found_q = super_scales.factors(products, 8, top)
    assert torch.equal((found_d[..., None] * found_q.unflatten(1, (2, 8))).flatten(1), products)
    assert found_q.max() <= top
    with pytest.raises(ValueError, match="not of two levels"):
        super_scales.factors(torch.rand(4, 8, generator=generator), 8, top)


def test_nearest_is_no_worse_than_the_largest_value_at_the_top() -> None:
    """The reference: d that has the largest of a super-block at 63, in float64."""
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.rand(2, 100, 16, generator=generator)
    d, q = super_scales.nearest(values, weights, 8, 63, 1)
    assert torch.equal(q, q.round()) and q.min() >= 1 and q.max() <= 63 and torch.equal(d, d.half().float())

    def cost(steps: torch.Tensor) -> torch.Tensor:
        v, w = (part.double().unflatten(1, (2, 8)) for part in (values, weights))
        return (w * (steps * (v / steps).round().clamp(1, 63) - v).square()).sum(-1)

    plain = cost((values.unflatten(1, (2, 8)).amax(-1, keepdim=True) / 63).half().double())
    ours = cost(d.double()[..., None])
    assert (ours <= plain * (1 + 1e-6)).all() and ours.sum() < 0.9 * plain.sum()


@pytest.mark.parametrize("name", TWO_LEVELS)
def test_a_solved_layer_is_on_the_stored_grid(name: str) -> None:
    """Scales and offsets are products; it is near to a layer of free scales, nearer than one that is rounded."""
    weight, goal = problem()
    args = QuantizationArgs.of(name, 4, None, False)
    settings = Settings(bits=4, method="gptq", starts=1, tabu=0).of(args)
    found = quantize(weight, goal, settings)
    d, sc, dmin, m = super_scales.parts_of(found.scale, found.zero, name)
    scale, zero = super_scales.grid(d, sc, dmin, m, 2 ** (args.num_bits - 1))
    assert torch.equal(scale, found.scale) and torch.allclose(zero, found.zero, atol=1e-5)
    assert found.integers.max() < 2**args.num_bits
    free = quantize(weight, goal, settings.but(format="int"))
    nearest = quantize(weight, None, settings)
    error = nearest.dequantize() - weight
    assert found.loss is not None and free.loss is not None
    assert found.loss < (1.15 if args.num_bits > 3 else 1.5) * free.loss and found.loss < 0.7 * float(
        goal.loss(error).sum()
    )
