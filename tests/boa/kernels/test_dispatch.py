"""The compiled kernels against the torch form of the same steps."""

import pytest
import torch
from torch import Tensor

from rotoboa.boa.kernels import compiled
from rotoboa.boa.kernels import dispatch as kernels
from rotoboa.boa.objective.objective import Objective, inverse_factor
from rotoboa.boa.solver.refine import sweep

from ..problems import damped_gram, random


def _random(*shape: int, seed: int) -> Tensor:
    return random(*shape, seed=seed, dtype=torch.float32)


def _in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "is_compiled", lambda tensor: False)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("batch", "rows", "width"), [(1, 1, 1), (1, 300, 128), (3, 40, 17)])
def test_rounding_is_the_same_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, batch: int, rows: int, width: int, threads: int
) -> None:
    block = _random(batch, rows, width, seed=1)
    upper = inverse_factor(damped_gram(batch, width, 2)).float()
    scale = _random(batch, rows, width, seed=3).abs() * 0.2 + 0.3
    zero = _random(batch, rows, width, seed=4).round().clamp(-1, 1) + 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(compiled, "_SERIAL", 1)
    before = block.clone()
    own = kernels.round_block(block, upper, scale, zero, 3)
    assert torch.equal(block, before)
    _in_torch(monkeypatch)
    for found, expected in zip(own, kernels.round_block(block, upper, scale, zero, 3), strict=True):
        assert torch.equal(found, expected)
    assert own[0].unique().tolist() == [0, 1, 2, 3] or rows * width == 1


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_descent_is_the_same(monkeypatch: pytest.MonkeyPatch, tied: bool, shared: bool, threads: int) -> None:
    """Independent rows to the last bit; tied ones but for the order of sums over rows."""
    heads, rows, width = 5, 16, 128
    h_in = damped_gram(1 if shared else heads, width, 1).float()
    h_out = damped_gram(heads, rows, 2).float() if tied else None
    q = torch.randint(0, 8, (heads, rows, width), generator=torch.Generator().manual_seed(3)).float()
    scale = _random(heads, rows, width, seed=4).abs() * 0.1 + 0.2  # groups of one column
    inner = _random(heads, rows, width, seed=5) @ h_in * 0.1
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(compiled, "_SERIAL", 1)
    results = []
    for fast in (True, False):
        own, moved_q = inner.clone(), q.clone()
        if not fast:
            _in_torch(monkeypatch)
        moved = sweep(own, moved_q, scale, h_in, h_out, 7)
        assert torch.equal(moved, (moved_q != q).any(-1))
        results.append((moved_q, own))
    (found, followed), (expected, expected_followed) = results
    assert torch.equal(found, expected) and int((found != q).sum()) > 100
    torch.testing.assert_close(followed, expected_followed, rtol=0, atol=1e-5 * float(followed.abs().max()))


@pytest.mark.parametrize("tied", [True, False])
def test_descent_over_several_blocks(tied: bool) -> None:
    """More columns than a block has, groups, rows that are not in order: E H_in and the integers stay consistent."""
    heads, rows, width = 3, 8, 300
    h_in, h_out = damped_gram(heads, width, 1).float(), damped_gram(heads, rows, 2).float() if tied else None
    weight = _random(rows, heads, width, seed=5).transpose(0, 1)
    scale, zero = torch.full((heads, rows, 3), 0.7), 2.0
    q = (weight / 0.7 + zero).round_().clamp_(0, 3)
    assert not q.is_contiguous()
    objective = Objective(h_in.double(), None if h_out is None else h_out.double())

    def error() -> Tensor:
        return (q - zero) * 0.7 - weight

    inner, before = error() @ h_in, objective.loss(error().double())
    for _ in range(3):
        sweep(inner, q, scale, h_in, h_out, 3)
        expected = error().double() @ h_in.double()
        torch.testing.assert_close(inner.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        after = objective.loss(error().double())
        assert torch.all(after < before)
        before = after
    assert q.unique().tolist() == [0, 1, 2, 3]
