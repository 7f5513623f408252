"""The solver against error compensation on the whole Kronecker matrix, densely, in float64; and parts against wholes.

In float64 the solver and the references differ by 1e-13 at most before a rounding, so integers and scales are equal.
"""

import pytest
import torch
from torch import Tensor

from rotoboa.boa.kernels.squares import round_to
from rotoboa.boa.objective.objective import Objective
from rotoboa.boa.solver import columns as columns_module
from rotoboa.boa.solver.grid import search
from rotoboa.boa.solver.rounding import Quantized, quantize
from rotoboa.boa.solver.rounding_settings import Settings

from ..problems import PLAIN, problem, same


def _parts(result: Quantized, head: slice) -> Quantized:
    return Quantized(result.integers[head], result.scale[head], result.zero[head])


# references


def _obs(target: Tensor, objective: Objective, settings: Settings) -> Quantized:
    """The definition: after each rounding, all weights not yet rounded are set to what then minimises the loss.

    The minimum is found by solving with the whole Kronecker matrix of a head, without any factor of it. Rounded
    together are the `rows` rows of one column. A grid is searched when its first column is reached, on the rows as
    they then are.
    """
    damped = objective.damped(settings.damping)
    heads, rows, columns = target.shape
    group = settings.group_size or columns
    result = Quantized(
        torch.zeros(heads, rows, columns, dtype=torch.uint8),
        *torch.zeros(2, heads, rows, columns // group, dtype=torch.float64),
    )
    for head in range(heads):
        h_in = damped.h_in[head if len(damped.h_in) > 1 else 0]
        h_out = torch.eye(rows, dtype=torch.float64) if damped.h_out is None else damped.h_out[head]
        h = torch.kron(h_out, h_in)  # of vec(E) that lines up the rows of E
        fixed = torch.zeros(rows, columns, dtype=torch.bool)
        error = torch.zeros(rows, columns, dtype=torch.float64)
        step = rows if damped.h_out is None else settings.rows
        for start in range(0, rows, step):
            block = slice(start, start + step)
            for i in range(columns):
                now = target[head] + error
                g, span = i // group, slice(i // group * group, (i // group + 1) * group)
                if i % group == 0:
                    found = search(now[None, block, span], h_in[None, span, span], settings.grid_settings)
                    result.scale[head, block, g], result.zero[head, block, g] = (part[0] for part in found)
                s, z = result.scale[head, block, g], result.zero[head, block, g]
                q = round_to(now[block, i], s, z, 2**settings.bits - 1)
                result.integers[head, block, i] = q.to(torch.uint8)
                error[block, i] = (q - z) * s - target[head, block, i]
                fixed[block, i] = True
                free = ~fixed.flatten()
                if free.any():
                    known = h[free][:, ~free] @ error.flatten()[~free]
                    error.view(-1)[free] = -torch.linalg.solve(h[free][:, free], known)
    return result


def _dense_gptq(target: Tensor, objective: Objective, settings: Settings) -> Quantized:
    """GPTQ as published on vec(W), row after row, of one head, by the Cholesky factor of the inverse of the whole."""
    damped = objective.damped(settings.damping)
    assert damped.h_out is not None
    rows, columns = target.shape
    upper = torch.linalg.cholesky(torch.linalg.inv(torch.kron(damped.h_out[0], damped.h_in[0])), upper=True)
    work, integers = target.flatten().clone(), torch.zeros(rows * columns, dtype=torch.uint8)
    scale, zero = torch.zeros(2, rows, dtype=torch.float64)
    for i in range(len(work)):
        r = i // columns
        if i % columns == 0:
            found = search(work[None, None, i : i + columns], damped.h_in, settings.grid_settings)
            scale[r], zero[r] = (part[0, 0] for part in found)
        q = round_to(work[i], scale[r], zero[r], 2**settings.bits - 1)
        integers[i] = int(q)
        work[i:] -= (work[i] - (q - zero[r]) * scale[r]) / upper[i, i] * upper[i, i:]
    return Quantized(integers.view(1, rows, columns), scale.view(1, rows, 1), zero.view(1, rows, 1))


def _textbook_gptq(weight: Tensor, h_in: Tensor, settings: Settings) -> Quantized:
    """GPTQ (arXiv 2210.17323) of a layer (r, c), column by column; act order as its authors' `static_groups`."""
    rows, columns = weight.shape
    group, levels = settings.group_size or columns, 2**settings.bits - 1
    h = Objective(h_in[None]).damped(settings.damping).h_in[0]
    order = h.diagonal().argsort(descending=True) if settings.act_order else torch.arange(columns)
    upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    work, integers = weight[:, order].clone(), torch.zeros(rows, columns, dtype=torch.uint8)
    scale, zero = torch.zeros(2, rows, columns // group, dtype=torch.float64)
    for place, column in enumerate(order.tolist()):
        g = column // group
        span = slice(g * group, (g + 1) * group)
        if settings.act_order and place == 0:
            for every in range(columns // group):
                part = slice(every * group, (every + 1) * group)
                found = search(weight[None, :, part], h[None, part, part], settings.grid_settings)
                scale[:, every], zero[:, every] = (x[0] for x in found)
        if not settings.act_order and column % group == 0:
            found = search(work[None, :, span], h[None, span, span], settings.grid_settings)
            scale[:, g], zero[:, g] = (x[0] for x in found)
        q = round_to(work[:, place], scale[:, g], zero[:, g], levels)
        integers[:, column] = q.to(torch.uint8)
        error = (work[:, place] - (q - zero[:, g]) * scale[:, g]) / upper[place, place]
        work[:, place:] -= error[:, None] * upper[place, place:]
    return Quantized(integers[None], scale[None], zero[None])


# equality


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (4, 6), (8, 16)])
def test_row_after_row_is_gptq_on_the_kronecker_matrix(rows: int, columns: int, bits: int, symmetric: bool) -> None:
    settings = PLAIN.but(bits=bits, symmetric=symmetric)
    for seed in range(3):
        weight, objective = problem(1, rows, columns, seed=seed)
        same(quantize(weight, objective, settings), _dense_gptq(weight[0], objective, settings))


@pytest.mark.parametrize("method", ["minmax", "diagonal", "hessian"])
@pytest.mark.parametrize("group_size", [None, 4, 8])
@pytest.mark.parametrize("rows", [1, 3, 4, 8])
def test_row_blocks_follow_the_definition(rows: int, group_size: int | None, method: str) -> None:
    """BoA takes one row at a time, TurboBoA several (3 of 8 leave a smaller last block), d_h of them are GPTQ's."""
    settings = PLAIN.but(rows=rows, group_size=group_size, grid=method)
    weight, objective = problem(2, 8, 16)
    same(quantize(weight, objective, settings), _obs(weight, objective, settings))


@pytest.mark.parametrize("h_out", [False, True])
@pytest.mark.parametrize(("heads", "shared"), [(1, True), (3, False), (3, True)])
@pytest.mark.parametrize("rows", [1, 2])
def test_heads_follow_the_definition(rows: int, heads: int, shared: bool, h_out: bool) -> None:
    settings = PLAIN.but(rows=rows)
    weight, objective = problem(heads, 6, 10, shared=shared, h_out=h_out)
    same(quantize(weight, objective, settings), _obs(weight, objective, settings))


def test_h_out_matters() -> None:
    """Or the tests above would compare GPTQ with GPTQ."""
    weight, objective = problem(1, 8, 16)
    boa, gptq = (quantize(weight, objective, PLAIN.but(method=method)) for method in ("boa", "gptq"))
    assert not torch.equal(boa.integers[:, 1:], gptq.integers[:, 1:])
    assert torch.equal(boa.integers[:, 0], gptq.integers[:, 0])  # nothing has moved the first row


def test_all_rows_at_once_is_gptq() -> None:
    weight, objective = problem(2, 8, 16)
    boa, gptq = (quantize(weight, objective, PLAIN.but(method=m, rows=8)) for m in ("boa", "gptq"))
    same(boa, gptq)
    same(quantize(weight, objective, PLAIN.but(rows=100)), gptq)


@pytest.mark.parametrize("method", ["boa", "gptq"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 4, 8])
@pytest.mark.parametrize("columns", [24, 160])
def test_textbook_gptq(columns: int, group_size: int | None, act_order: bool, method: str) -> None:
    settings = PLAIN.but(method=method, group_size=group_size, act_order=act_order)
    weight, objective = problem(1, 12, columns, h_out=False)
    same(quantize(weight, objective, settings), _textbook_gptq(weight[0], objective.h_in[0], settings))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 4, 150])
@pytest.mark.parametrize("h_out", [False, True])
def test_lazy_updates_change_nothing(
    h_out: bool, group_size: int | None, act_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PLAIN.but(group_size=group_size, act_order=act_order, rows=4)
    weight, objective = problem(2, 8, 300, h_out=h_out)
    lazy = quantize(weight, objective, settings)
    monkeypatch.setattr(columns_module, "COLUMN_BLOCK", 1)
    same(quantize(weight, objective, settings), lazy)


@pytest.mark.parametrize("h_out", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("shared", [False, True])
def test_heads_at_once_are_heads_one_at_a_time(
    shared: bool, group_size: int | None, act_order: bool, h_out: bool
) -> None:
    """With a round of refinement and restarts too. Without a shared H_in each head has an order of its own.

    One round: of several, heads at once stop together, when nothing moves in any of them.
    """
    settings = PLAIN.but(group_size=group_size, act_order=act_order, rows=4, refine=1, starts=3)
    weight, objective = problem(4, 8, 24, shared=shared, h_out=h_out)
    together = quantize(weight, objective, settings)
    total = 0.0
    for i in range(4):
        head = slice(i, i + 1)
        own = Objective(
            objective.h_in if shared else objective.h_in[head],
            None if objective.h_out is None else objective.h_out[head],
        )
        alone = quantize(weight[head], own, settings)
        same(alone, _parts(together, head))
        assert alone.loss is not None
        total += alone.loss
    assert together.loss == pytest.approx(total, rel=1e-12)


def test_rows_are_independent_without_h_out() -> None:
    settings = PLAIN.but(act_order=True, refine=1, starts=3)
    weight, objective = problem(1, 9, 24, h_out=False)
    whole = quantize(weight, objective, settings)
    for part in (slice(0, 1), slice(3, 9)):
        some = quantize(weight[:, part], objective, settings)
        same(some, Quantized(whole.integers[:, part], whole.scale[:, part], whole.zero[:, part]))
