"""Tabu search against searches written out in float64, and what it must not do."""

from itertools import product

import pytest
import torch
from torch import Tensor

from rotoboa.boa.kernels import compiled
from rotoboa.boa.kernels import dispatch as kernels
from rotoboa.boa.kernels.dispatch import rest_until, search_block
from rotoboa.boa.solver import tabu
from rotoboa.boa.solver.refine import dequantize
from rotoboa.boa.solver.rounding import Quantized, quantize
from rotoboa.boa.solver.rounding_settings import Settings

from ..problems import KINDS, SLACK, damped_problem, dense_losses, nearest, refine_from


def whole(heads: int, rows: int, columns: int, *, shared: bool, seed: int = 0) -> tuple[Tensor, ...]:
    """gradient, integers, scale and H_in, of numbers whose sums and products are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (1 if shared else heads, 2 * columns, columns), generator=generator).float()
    h_in = x.transpose(1, 2) @ x + torch.eye(columns)
    integers = torch.randint(0, 4, (heads, rows, columns), generator=generator).float()
    scale = 2 ** torch.randint(-1, 2, (heads, rows, columns), generator=generator).float()
    error = torch.randint(-4, 5, (heads, rows, columns), generator=generator) / 4
    return error @ h_in, integers, scale, h_in


def slowly(gradient: Tensor, integers: Tensor, scale: Tensor, h_in: Tensor, levels: int, moves: int) -> Tensor:
    """The search of one row in float64: every step's loss from the whole quadratic form."""
    best = at = integers.double()
    rests, lowest = [0] * len(at), 0.0

    def loss(q: Tensor) -> float:
        d = (q - integers) * scale.double()
        return float(2 * d @ gradient.double() + d @ h_in.double() @ d)

    for move in range(moves):
        tried = []
        for column in range(len(at)):
            for step in (-1, 1):  # of two that cost the same the fall is taken
                if rests[column] <= move and 0 <= at[column] + step <= levels:
                    changed = at.clone()
                    changed[column] += step
                    tried.append((loss(changed), column, step, changed))
        if not tried:
            continue
        cost, column, _, at = min(tried, key=lambda found: found[:3])
        rests[column] = rest_until(move)
        if cost < lowest:
            lowest, best = cost, at
    return best


@pytest.mark.parametrize("form", ["compiled", "torch"])
@pytest.mark.parametrize(("heads", "columns", "shared"), [(1, 1, True), (1, 7, True), (2, 20, True), (3, 20, False)])
def test_every_form_takes_the_steps_of_a_slow_search(
    monkeypatch: pytest.MonkeyPatch, form: str, heads: int, columns: int, shared: bool
) -> None:
    gradient, integers, scale, h_in = whole(heads, 4, columns, shared=shared)
    if form == "torch":
        monkeypatch.setattr(kernels, "is_compiled", lambda tensor: False)
    found = search_block(gradient, integers, scale, h_in, 3, 40)
    assert not torch.equal(found, integers)
    for head, row in product(range(heads), range(4)):
        h = h_in[head if len(h_in) > 1 else 0]
        expected = slowly(gradient[head, row], integers[head, row], scale[head, row], h, 3, 40)
        assert found[head, row].tolist() == expected.tolist()


def test_torch_and_compiled_form_agree_where_there_are_many_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient, integers, scale, h_in = whole(2, 3, 150, shared=True)
    found = search_block(gradient, integers, scale, h_in, 3, 300)
    monkeypatch.setattr(kernels, "is_compiled", lambda tensor: False)
    assert torch.equal(found, search_block(gradient, integers, scale, h_in, 3, 300))


def test_no_row_depends_on_what_it_is_searched_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient, integers, scale, h_in = whole(3, 8, 40, shared=False)
    found = search_block(gradient, integers, scale, h_in, 3, 60)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(compiled, "_SERIAL", 1)
    assert torch.equal(found, search_block(gradient, integers, scale, h_in, 3, 60))
    alone = search_block(gradient[1:2, 2:4], integers[1:2, 2:4], scale[1:2, 2:4], h_in[1:2], 3, 60)
    assert torch.equal(found[1:2, 2:4], alone)


def test_the_global_minimum_of_small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 rows of 8 columns and 2 bits; coordinate descent alone misses a good part of the minima."""
    monkeypatch.setattr(kernels, "REST", 2)  # of so few columns not all are to rest
    target, objective = damped_problem(1, 64, 8, h_out=False)
    start = refine_from(nearest(target, 2), target, objective, 2, 8)
    every = torch.tensor(list(product(range(4), repeat=8)), dtype=torch.float64)
    errors = (every[None] - start.zero[0, :, None]) * start.scale[0, :, None] - target[0, :, None]
    least = torch.einsum("rni,ij,rnj->rn", errors, objective.h_in[0], errors).amin(-1)

    def losses(q: Tensor) -> Tensor:
        error = (dequantize(q, start.scale, start.zero) - target)[0]
        return torch.einsum("ri,ij,rj->r", error, objective.h_in[0], error)

    q = start.integers.double()
    before = int((losses(q) <= least * SLACK).sum())
    inner = (dequantize(q, start.scale, start.zero) - target) @ objective.h_in
    tabu.search(inner, q, start.scale, objective.h_in, None, 3, 8.0)
    after = int((losses(q) <= least * SLACK).sum())
    assert before < 45 and after > 55


@KINDS
@pytest.mark.parametrize("group", [None, 6])
def test_a_search_lowers_the_loss_and_carries_the_error_along(
    monkeypatch: pytest.MonkeyPatch, heads: int, shared: bool, h_out: bool, group: int | None
) -> None:
    target, objective = damped_problem(heads, 6, 24, shared=shared, h_out=h_out)
    start = refine_from(nearest(target, 2, group), target, objective, 2, 8)
    monkeypatch.setattr(tabu, "WIDTH", 16)  # so that columns are taken in two parts
    q = start.integers.double()
    inner = (dequantize(q, start.scale, start.zero) - target) @ objective.h_in
    tabu.search(inner, q, start.scale, objective.h_in, objective.h_out, 3, 2.0)
    found = Quantized(q.to(torch.uint8), start.scale, start.zero)
    torch.testing.assert_close(inner, (found.dequantize() - target) @ objective.h_in)
    before, after = dense_losses(start, target, objective), dense_losses(found, target, objective)
    assert bool((after <= before * SLACK).all()) and bool((after < 0.999 * before).any())


@KINDS
def test_a_search_never_ends_worse(heads: int, shared: bool, h_out: bool) -> None:
    target, objective = damped_problem(heads, 8, 32, shared=shared, h_out=h_out)
    weight, settings = target.float(), Settings(bits=2, rows=4, starts=2, tabu=0)
    before = quantize(weight, objective, settings)
    after = quantize(weight, objective, Settings(**{**vars(settings), "tabu": 2.0}))
    assert before.loss is not None and after.loss is not None
    assert after.loss < 0.995 * before.loss


def test_nothing_moves_where_nothing_can_be_gained() -> None:
    gradient, integers, scale, h_in = whole(1, 4, 12, shared=True)
    assert torch.equal(search_block(0 * gradient, integers, scale, h_in, 3, 50), integers)
    assert torch.equal(search_block(gradient, integers, scale, h_in, 3, 0), integers)
