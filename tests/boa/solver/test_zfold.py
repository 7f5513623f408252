"""Z-Fold's least squares against dense solvers in float64, and what they find in weights that have the structure."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rotoboa.boa.objective.objective import Objective
from rotoboa.boa.solver import zfold
from rotoboa.boa.solver.rounding_settings import Settings
from rotoboa.boa.solver.zfold import Term, alternate, channel_scales, column_scales, row_step, zeta_step

HEADS, ROWS, COLUMNS = 3, 4, 8
TIE = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
EACH = torch.arange(COLUMNS)
QUICK = Settings(bits=2, refine=1, starts=1, tabu=0, rows=2)


def _psd(*shape: int, seed: int) -> Tensor:
    x = torch.randn(*shape[:-1], 3 * shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.transpose(-1, -2) / x.shape[-1]


def _term(shared: bool, tied: bool, seed: int = 0) -> tuple[Term, Tensor]:
    """A term and levels A that are near to its weights: H_in shared by heads or not, H_out there or not."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(HEADS, ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    h_in = _psd(1 if shared else HEADS, COLUMNS, COLUMNS, seed=seed + 1)
    h_out = _psd(HEADS, ROWS, ROWS, seed=seed + 2) if tied else None
    levels = weight + 0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return Term(weight, Objective(h_in, h_out), QUICK), levels


def _design(term: Term, part: Tensor) -> Tensor:
    """C_out^T part C_in for each head, flat, with H = C C^T: its squared norm is the loss."""
    objective = term.objective
    inner = torch.linalg.cholesky(objective.h_in).expand(HEADS, -1, -1)
    out = torch.eye(ROWS, dtype=part.dtype).expand(HEADS, -1, -1)
    if objective.h_out is not None:
        out = torch.linalg.cholesky(objective.h_out)
    return (out.transpose(-1, -2) @ part @ inner).flatten()


def _whole(term: Term) -> float:
    return float(_design(term, term.weight).square().sum())


@pytest.mark.parametrize("tie", [EACH, TIE], ids=["each", "tied"])
@pytest.mark.parametrize("tied_rows", [False, True])
def test_zeta_is_that_of_a_dense_solver(tie: Tensor, tied_rows: bool) -> None:
    """Two terms of different Hessians at once, each relative to its loss at a zero weight."""
    pairs = [_term(True, tied_rows, seed=0), _term(False, tied_rows, seed=9)]
    terms, levels = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    columns, target = [], []
    for term, a in pairs:
        scale = _whole(term) ** -0.5
        columns.append(torch.stack([_design(term, a * (tie == k)) * scale for k in range(int(tie.max()) + 1)], 1))
        target.append(_design(term, term.weight) * scale)
    expected = torch.linalg.lstsq(torch.cat(columns), torch.cat(target)[:, None], driver="gelsd").solution[:, 0]
    assert ((expected > 0.55) & (expected < 1.95)).all() and (expected - 1).abs().max() > 0.02
    torch.testing.assert_close(zeta_step(terms, levels, tie), expected, rtol=0, atol=1e-5)
    for term, a in pairs:
        relative = _design(term, a - term.weight).square().sum() / _whole(term)
        assert float(term.loss(a)) == pytest.approx(float(relative), rel=1e-9)


@pytest.mark.parametrize("tied_rows", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_scales_of_rows_are_those_of_a_dense_solver(shared: bool, tied_rows: bool) -> None:
    term, a = _term(shared, tied_rows)
    cells = [(h, r) for h in range(HEADS) for r in range(ROWS)]
    columns = []
    for h, r in cells:
        part = torch.zeros_like(a)
        part[h, r] = a[h, r]
        columns.append(_design(term, part))
    solved = torch.linalg.lstsq(torch.stack(columns, 1), _design(term, term.weight)[:, None], driver="gelsd").solution
    expected = a * solved.view(HEADS, ROWS, 1)
    torch.testing.assert_close(row_step(term, a), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("group", [COLUMNS, 4])
def test_no_step_raises_the_loss(group: int) -> None:
    """From bad levels too, where a full step would leave the bounds, and with a channel that no integer describes."""
    for seed in range(20):
        pairs = [_term(True, True, seed=seed), _term(False, False, seed=seed + 50)]
        terms = [replace(pair[0], settings=QUICK.but(group_size=group)) for pair in pairs]
        noise = torch.randn(2, *pairs[0][1].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        levels = [a + 1.5 * n for (_, a), n in zip(pairs, noise, strict=True)]
        for a in levels:
            a[..., 5] = 0
        losses = [float(sum(map(Term.loss, terms, levels)))]
        for _ in range(4):
            step = zeta_step(terms, levels, EACH)
            assert (step >= 0.499).all() and (step <= 2.001).all() and step[5] == pytest.approx(1, abs=1e-6)
            levels = [a * step for a in levels]
            losses.append(float(sum(map(Term.loss, terms, levels))))
            levels = [row_step(term, a) for term, a in zip(terms, levels, strict=True)]
            losses.append(float(sum(map(Term.loss, terms, levels))))
        assert all(after <= before * (1 + 1e-12) for before, after in pairwise(losses))
        assert losses[-1] < 0.9 * losses[0]


def test_alternation_keeps_account_of_what_it_changed() -> None:
    """Levels end as the first ones times zeta and a factor a row."""
    term, a = _term(True, True)
    levels = [a.clone()]
    zeta = alternate([term], levels, TIE)
    ratio = levels[0] / (a * zeta[TIE])
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    assert float(term.loss(levels[0])) < float(term.loss(a))


def _planted(tie: Tensor, spread: float) -> tuple[Tensor, Tensor]:
    """Weights that are 2-bit integers times a scale a row and a channel, without an error; and the latter."""
    generator = torch.Generator().manual_seed(3)
    levels = torch.randint(0, 4, (1, 24, len(tie)), generator=generator) - 1.0
    rows = 0.5 + torch.rand(1, 24, 1, generator=generator)
    zeta = (spread * torch.randn(int(tie.max()) + 1, generator=generator)).exp()
    zeta /= zeta.log().mean().exp()
    return levels * rows * zeta[tie], zeta


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_planted_scales_are_found(group: int | None, tied: bool) -> None:
    tie = torch.arange(32) if not tied else torch.arange(16).view(2, 1, 8).expand(-1, 2, -1).flatten()
    weight, zeta = _planted(tie, 0.5)
    objective = Objective(_psd(1, 32, 32, seed=4).float()).damped(0.01)
    settings = Settings(bits=2, group_size=group, refine=1, starts=1, tabu=0)
    found = channel_scales([Term(weight, objective, settings)], tie)
    assert found.loss < 0.25 * found.without
    correlation = torch.corrcoef(torch.stack([found.zeta.log(), zeta.log()]))[0, 1]
    assert correlation > (0.9 if tied or group is None else 0.8)
    assert found.zeta.log().mean().abs() < 1e-5
    summary = found.summary()
    assert summary["least"] < 1 < summary["most"] and summary["loss"] == found.loss


def test_scales_are_left_out_where_they_do_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rounds and on weights of one size the better start is 1, as it stands."""
    weight, _ = _planted(EACH, 0.0)
    objective = Objective(torch.eye(COLUMNS)[None]).damped(0.01)
    found = channel_scales([Term(weight, objective, QUICK)])
    assert found.loss <= found.without
    rough = Term(torch.randn(1, 4, COLUMNS, generator=torch.Generator().manual_seed(0)), objective, QUICK)
    monkeypatch.setattr(zfold, "ROUNDS", 0)
    found = channel_scales([rough])
    assert found.loss <= found.without


def test_size_of_columns() -> None:
    """Rows count alike however large they are; ties take the mean of their channels."""
    weight = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    term = Term(weight, Objective(torch.eye(2)[None]), QUICK)
    torch.testing.assert_close(column_scales([term], torch.arange(2)), torch.tensor([0.75, 4 / 3]).sqrt())
    torch.testing.assert_close(column_scales([term], torch.zeros(2, dtype=torch.long)), torch.ones(1))
