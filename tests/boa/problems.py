"""Random layers to be rounded, with objectives as activations give them, and their losses written out in float64."""

import pytest
import torch
from torch import Tensor

from rotoboa.boa.objective.objective import Objective
from rotoboa.boa.solver.grid import GridSettings
from rotoboa.boa.solver.refine import refine
from rotoboa.boa.solver.rounding import Quantized, quantize
from rotoboa.boa.solver.rounding_settings import Settings

# One pass of the solver and nothing after it.
PLAIN = Settings(bits=3, refine=0, starts=1, tabu=0, act_order=False, rows=1, damping=0.01)
# What summation order may lose of a loss, whose terms are some hundred times larger than it.
SLACK = 1 + 1e-10
KINDS = pytest.mark.parametrize(
    ("heads", "shared", "h_out"),
    [(1, True, False), (1, True, True), (3, False, False), (3, False, True), (3, True, True), (3, True, False)],
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_gram(*batch: int, size: int, seed: int = 0) -> Tensor:
    """Of correlated vectors with a few large entries, as activations have."""
    x = random(*batch, 3 * size, size, seed=seed)
    x = (x + 0.7 * x[..., :1] + 0.7 * x.roll(1, -1)) * torch.linspace(0.3, 2, size, dtype=torch.float64)
    return x.transpose(-1, -2) @ x


def damped_gram(batch: int, size: int, seed: int) -> Tensor:
    """What the kernels are given the factor of: of float32 vectors, damped in float64."""
    x = random(batch, 2 * size, size, seed=seed, dtype=torch.float32)
    x = x + 0.5 * x[..., :1]
    return Objective(x.transpose(1, 2) @ x).damped(0.01).h_in


def problem(
    heads: int, rows: int, columns: int, *, shared: bool = False, h_out: bool = True, seed: int = 0
) -> tuple[Tensor, Objective]:
    """A weight (heads, rows, columns), and an objective that is not damped; `shared`: one H_in of all heads."""
    objective = Objective(
        random_gram(1 if shared else heads, size=columns, seed=10 * seed + 1),
        random_gram(heads, size=rows, seed=10 * seed + 3) if h_out else None,
    )
    return random(heads, rows, columns, seed=10 * seed + 2), objective


def damped_problem(
    heads: int, rows: int, columns: int, *, h_out: bool, shared: bool = False, seed: int = 0
) -> tuple[Tensor, Objective]:
    """A target, and a damped objective."""
    target, objective = problem(heads, rows, columns, shared=shared, h_out=h_out, seed=seed)
    return target, objective.damped(0.01)


def nearest(target: Tensor, bits: int, group: int | None = None, *, symmetric: bool = False) -> Quantized:
    """Each weight to its nearest level: a start that leaves much to gain."""
    return quantize(target, None, Settings(bits=bits, method="rtn", group_size=group, symmetric=symmetric))


def refine_from(start: Quantized, target: Tensor, objective: Objective, bits: int, rounds: int) -> Quantized:
    return Quantized(
        *refine(target, start.integers, start.scale, start.zero, objective, GridSettings(bits), rounds=rounds)
    )


def dense_losses(result: Quantized, target: Tensor, objective: Objective) -> Tensor:
    """tr(H_out E H_in E^T) of each head, densely, in float64."""
    found = []
    for head, error in enumerate((result.dequantize() - target).double()):
        h_in = objective.h_in[head if len(objective.h_in) > 1 else 0]
        h_out = torch.eye(len(error), dtype=torch.float64) if objective.h_out is None else objective.h_out[head]
        found.append(torch.trace(h_out @ error @ h_in @ error.T))
    return torch.stack(found)


def same(one: Quantized, other: Quantized) -> None:
    assert one.integers.shape == other.integers.shape
    assert torch.equal(one.integers, other.integers)
    assert torch.equal(one.scale, other.scale) and torch.equal(one.zero, other.zero)


def check_stored(result: Quantized, bits: int) -> None:
    """Integers and zero points are of the range, scales positive and as they are stored."""
    assert result.integers.dtype == torch.uint8 and int(result.integers.max()) <= 2**bits - 1
    assert torch.equal(result.scale, result.scale.half().to(result.scale.dtype)) and float(result.scale.min()) > 0
    assert torch.equal(result.zero, result.zero.round())
    assert float(result.zero.min()) >= 0 and float(result.zero.max()) <= 2**bits - 1
