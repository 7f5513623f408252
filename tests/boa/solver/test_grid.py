"""The shrink search against brute force over its lattice, in float64."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rotoboa.boa.kernels import squares
from rotoboa.boa.kernels.squares import round_to
from rotoboa.boa.solver import grid
from rotoboa.boa.solver.grid import GridSettings, search, snap
from rotoboa.boa.solver.rounding_settings import Settings

ROWS, COLUMNS = 12, 16
METHODS = ["diagonal", "hessian"]


def _weight(seed: int = 0) -> Tensor:
    """Rows of ordinary weights, with outliers, of one sign, shifted, and with a single entry."""
    w = torch.randn(2, ROWS, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 0.1
    w[:, 1:4, 2] *= 12
    w[:, 4:6] = w[:, 4:6].abs()
    w[:, 6:8] = -w[:, 6:8].abs()
    w[:, 8] += 0.2
    w[:, 9, 1:] = 0
    return w


def _hessian(seed: int = 1) -> Tensor:
    """(2, c, c), correlated, with inputs of very different size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 40, COLUMNS, dtype=torch.float64, generator=generator)
    x = (x + x[..., :1]) * torch.logspace(-1, 1, COLUMNS, dtype=torch.float64)
    return x.transpose(1, 2) @ x


def _cost(w: Tensor, scale: float, zero: float, bits: int, h: Tensor) -> float:
    """e H e^T for one row (c,)."""
    levels = [max(0, min(2**bits - 1, round(v / scale + zero))) for v in w.tolist()]
    error = torch.tensor([scale * (level - zero) for level in levels], dtype=torch.float64) - w
    return float(error @ h @ error)


def _lattice(w: Tensor, bits: int, symmetric: bool) -> list[tuple[float, float]]:
    """All (scale, zero) of one row: shrinks of the range that includes 0, the zero point rounded down and up."""
    low, high, top = min(0.0, float(w.min())), max(0.0, float(w.max())), 2**bits - 1
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    full = (high - low) / top or 1.0
    points = []
    for i in range(grid.SHRINKS):
        shrink = 1 - 0.8 * i / grid.SHRINKS
        scale = float(torch.tensor(full * shrink, dtype=torch.float64).half())
        zeros = [2.0 ** (bits - 1)] if symmetric else [f(-low * shrink / scale) for f in (math.floor, math.ceil)]
        points += [(scale, min(max(zero, 0.0), top)) for zero in zeros]
    return points


def _problems() -> list[tuple[Tensor, Tensor, int, int]]:
    """Row, Hessian, and where they are."""
    weight, h = _weight(), _hessian()
    return [(weight[b, r], h[b], b, r) for b, r in itertools.product(range(2), range(ROWS))]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("metric", ["identity", "diagonal", "hessian"])
def test_equals_brute_force(metric: str, bits: int, symmetric: bool) -> None:
    settings = GridSettings(bits, symmetric, "hessian" if metric == "identity" else metric)
    scale, zero = search(_weight(), None if metric == "identity" else _hessian(), settings)
    for w, h, b, r in _problems():
        seen = {"identity": torch.eye(COLUMNS, dtype=h.dtype), "diagonal": h.diagonal().diag(), "hessian": h}[metric]
        lattice = _lattice(w, bits, symmetric)
        costs = [_cost(w, s, z, bits, seen) for s, z in lattice]
        chosen = (float(scale[b, r]), float(zero[b, r]))
        assert chosen in lattice
        # Costs, not places: two points of the lattice can round all weights alike. What is lost to summation order is
        # relative to the terms, which are as large as the dearest candidates'.
        assert _cost(w, *chosen, bits, seen) <= min(costs) + 1e-13 * max(costs)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_hessian_is_better_in_its_metric_than_the_diagonal(bits: int, symmetric: bool) -> None:
    scale, zero = search(_weight(), _hessian(), GridSettings(bits, symmetric, "hessian"))
    by_diagonal = search(_weight(), _hessian(), GridSettings(bits, symmetric, "diagonal"))
    better = 0
    for w, h, b, r in _problems():
        cost = _cost(w, float(scale[b, r]), float(zero[b, r]), bits, h)
        cheap = _cost(w, float(by_diagonal[0][b, r]), float(by_diagonal[1][b, r]), bits, h)
        assert cost <= cheap * (1 + 1e-12) + 1e-15
        better += cost < cheap * (1 - 1e-6)
        assert (float(scale[b, r]), float(zero[b, r])) in _lattice(w, bits, symmetric)
    assert better > ROWS / 4, "the full Hessian never mattered"


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_never_worse_than_the_full_range(dtype: torch.dtype, method: str, bits: int, symmetric: bool) -> None:
    """Row by row, in the metric of the method."""
    for seed in range(5):
        searched, plain = _costs(_weight(seed).to(dtype), _hessian(seed), method, GridSettings(bits, symmetric))
        # In float32 two candidates as good as each other may change places.
        assert torch.all(searched <= plain * (1 + 1e3 * torch.finfo(dtype).eps) + 1e-20)


def _costs(weight: Tensor, h: Tensor, method: str, settings: GridSettings) -> tuple[Tensor, Tensor]:
    """The error of each row in the metric of `method`, on the searched grid and on the full range's."""
    seen = h.diagonal(dim1=-2, dim2=-1).diag_embed() if method == "diagonal" else h
    found = []
    for name in (method, "minmax"):
        scale, zero = search(weight, h.to(weight.dtype), replace(settings, method=name))
        found.append(
            [
                _cost(weight[b, r].double(), float(scale[b, r]), float(zero[b, r]), settings.bits, seen[b])
                for b, r in itertools.product(range(2), range(ROWS))
            ]
        )
    searched, plain = torch.tensor(found, dtype=torch.float64)
    return searched, plain


@pytest.mark.parametrize("symmetric", [False, True])
def test_minmax_is_the_full_range(symmetric: bool) -> None:
    weight = _weight()
    scale, zero = search(weight, None, GridSettings(4, symmetric, "minmax"))
    for b, r in itertools.product(range(2), range(ROWS)):
        w = weight[b, r]
        low, high = min(0.0, float(w.min())), max(0.0, float(w.max()))
        if symmetric:
            low, high = -max(-low, high), max(-low, high)
        expected = torch.tensor((high - low) / 15).half()
        assert float(scale[b, r]) == float(expected)
        assert float(zero[b, r]) == (8 if symmetric else round(-low / float(expected)))


@pytest.mark.parametrize("method", [*METHODS, "minmax"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_zero_is_fixed(bits: int, method: str) -> None:
    _, zero = search(_weight(), _hessian(), GridSettings(bits, True, method))
    assert torch.all(zero == 2 ** (bits - 1))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", [*METHODS, "minmax"])
def test_scales_are_stored_as_they_are(method: str, symmetric: bool) -> None:
    """float16, positive; zero points integers of the range: whatever the size of the weights."""
    weight = _weight() * torch.logspace(-12, 4, ROWS, dtype=torch.float64)[:, None]
    for dtype in (torch.float32, torch.float64):
        scale, zero = search(weight.to(dtype), _hessian().to(dtype), GridSettings(3, symmetric, method))
        assert scale.shape == zero.shape == (2, ROWS) and scale.dtype == zero.dtype == dtype
        assert torch.equal(scale, scale.half().to(dtype)) and scale.min() > 0 and scale.isfinite().all()
        assert torch.equal(zero, zero.round()) and zero.min() >= 0 and zero.max() <= 7


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", [*METHODS, "minmax"])
def test_zero_rows_stay_zero(method: str, symmetric: bool) -> None:
    weight = _weight()
    weight[:, 3] = 0
    settings = GridSettings(2, symmetric, method)
    scale, zero = search(weight, _hessian(), settings)
    integers = round_to(weight[:, 3], scale[:, 3, None], zero[:, 3, None], settings.levels)
    assert torch.all((integers - zero[:, 3, None]) * scale[:, 3, None] == 0)
    # and say nothing about their neighbours
    others = [r for r in range(ROWS) if r != 3]
    assert torch.equal(search(weight[:, others], _hessian(), settings)[0], scale[:, others])


@pytest.mark.parametrize("method", METHODS)
def test_zero_point_may_lie_at_either_end(method: str) -> None:
    """Rows of one sign keep all levels on their side of zero."""
    _, zero = search(_weight(), _hessian(), GridSettings(4, False, method))
    assert torch.all(zero[:, 4:6] == 0) and torch.all(zero[:, 6:8] == 15)


@pytest.mark.parametrize("method", METHODS)
def test_many_rows_are_searched_each_for_itself(method: str) -> None:
    """More rows than are held at a time: 5,000 x 16 columns x 96 candidates."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 5000, COLUMNS, dtype=torch.float64, generator=generator)
    settings, h = GridSettings(3, False, method), _hessian()[:1]
    scale, zero = search(weight, h, settings)
    for rows in (slice(0, 3), slice(2700, 2760), slice(4999, 5000)):
        some = search(weight[:, rows], h, settings)
        assert torch.equal(some[0], scale[:, rows]) and torch.equal(some[1], zero[:, rows])


def test_snap() -> None:
    scale = torch.tensor([0.1, 1e-12, 1e9, 1.0 + 2**-11], dtype=torch.float64)
    assert snap(scale).tolist() == [float(torch.tensor(0.1).half()), 2.0**-24, 65504.0, 1.0]


def test_round_to() -> None:
    """Half to even, kept within 0 .. levels."""
    weight = torch.tensor([-3.0, -0.26, 0.25, 0.75, 0.6, 9.0])
    assert round_to(weight, torch.tensor(0.5), torch.tensor(1.0), 3).tolist() == [0, 0, 2, 2, 2, 3]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (40, 70)])
def test_compiled_costs_are_those_of_the_errors(rows: int, columns: int, shared: bool) -> None:
    """To the rounding of a sum of float32 numbers, also where it is spread over threads."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(2, rows, columns, generator=generator)
    scale = torch.rand(2, rows, 9, generator=generator) + 0.1
    zero = torch.randint(0, 4, (2, rows, 9), generator=generator).float()
    metric = torch.rand(1 if shared else 2, columns, generator=generator)
    found = squares.weighted_squares(weight, scale, zero, metric, 3)
    expected = squares.weighted_squares(weight.double(), scale.double(), zero.double(), metric.double(), 3)
    assert found.dtype == torch.float32
    # A quotient that is a tie in one precision may not be one in the other.
    near = (found - expected).abs() <= 1e-5 * expected
    assert near.double().mean() > 0.99


def test_what_is_not_said_is_what_the_solver_has() -> None:
    assert GridSettings(3) == Settings(bits=3).grid_settings
