"""What attention makes of errors in queries and keys: against its definition, and against divergences by autograd."""

import math

import pytest
import torch
from torch import Tensor

from rotoboa.boa.objective.fisher import fisher_grams
from rotoboa.boa.objective.statistics import AttentionStatistics
from rotoboa.boa.online.attention import AttentionInputs
from rotoboa.rotation.hadamard import Hadamard

from ..problems import random

SIZE, LENGTH, SEQUENCES, KEY_HEADS = 4, 9, 2, 2


def attention(group: int, window: int | None = None, *, sinks: bool = False) -> AttentionInputs:
    query = 2 * random(SEQUENCES, KEY_HEADS * group, LENGTH, SIZE, seed=1)
    own = random(KEY_HEADS * group, seed=4) if sinks else None
    return AttentionInputs(query, random(SEQUENCES, KEY_HEADS, LENGTH, SIZE, seed=2), 0.5, window, None, sinks=own)


def probabilities(seen: AttentionInputs, i: int, head: int, query: int) -> tuple[Tensor, slice]:
    """Of one query, and the keys that it sees."""
    near = slice(0 if seen.window is None else max(0, query + 1 - seen.window), query + 1)
    key = seen.key[i, head // (seen.query.shape[1] // KEY_HEADS), near]
    logits = seen.scaling * key @ seen.query[i, head, query]
    if seen.sinks is None:
        return torch.softmax(logits, 0), near
    return torch.softmax(torch.cat([logits, seen.sinks[head, None]]), 0)[:-1], near


@pytest.mark.parametrize("room", [1, 1 << 20])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("sinks", [False, True])
def test_against_the_definition(
    group: int, window: int | None, stride: int, room: int, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rotoboa.boa.objective.fisher.LEAST", 2)
    seen = attention(group, window, sinks=sinks)
    keys = torch.zeros(KEY_HEADS * group, SIZE, SIZE, dtype=torch.float64)
    queries = torch.zeros(KEY_HEADS, SIZE, SIZE, dtype=torch.float64)
    for i in range(SEQUENCES):
        for head in range(KEY_HEADS * group):
            for query in range((5 + i) % stride, LENGTH, stride):
                a, near = probabilities(seen, i, head, query)
                k, q = seen.key[i, head // group, near], seen.query[i, head, query]
                keys[head] += k.T @ (a.diag() - a[:, None] * a) @ k
                queries[head // group] += sum(float(p * (1 - p)) for p in a) * q[:, None] * q
    for one, other in zip(fisher_grams(seen, room, stride, 5), (keys, queries), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sinks", [False, True])
def test_it_is_the_curvature_of_the_divergence(sinks: bool) -> None:
    """The divergence of the probabilities that an error of every query of a head makes, to second order."""
    seen, head = attention(1, sinks=sinks), 1
    error = random(SIZE, seed=3)
    sink = seen.sinks[head, None] if seen.sinks is not None else torch.zeros(0).double()

    def divergence(size: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i in range(SEQUENCES):
            for query in range(LENGTH):
                key = seen.key[i, head, : query + 1]
                exact = seen.scaling * key @ seen.query[i, head, query]
                moved = torch.cat([exact + size * seen.scaling * key @ error, sink])
                exact = torch.cat([exact, sink])
                total = total + (exact.softmax(0) * (exact.log_softmax(0) - moved.log_softmax(0))).sum()
        return total

    curvature = torch.autograd.functional.hessian(divergence, torch.zeros((), dtype=torch.float64))
    found = seen.scaling**2 * error @ fisher_grams(seen, 1 << 20)[0][head] @ error
    assert math.isclose(float(curvature), float(found), rel_tol=1e-10)


def test_a_sink_that_all_attend_to_costs_nothing() -> None:
    """K^T K is the sink's alone; nothing of it is in what attention makes of errors."""
    seen = attention(1)
    seen.key[:, :, 0] = 100 * seen.query.mean(2)
    keys = fisher_grams(seen, 1 << 20)[0]
    plain = AttentionStatistics()
    plain.add_grams(seen.query, seen.key)
    assert (keys.diagonal(dim1=1, dim2=2).sum(1) < 0.2 * plain.grams()[0].diagonal(dim1=1, dim2=2).sum(1)).all()


def test_r3_is_taken_out() -> None:
    rotation, seen = Hadamard.of(SIZE), attention(2)
    plain, rotated = AttentionStatistics(), AttentionStatistics(rotation)
    plain.add_fisher(seen)
    rotated.add_fisher(
        AttentionInputs(rotation.apply(seen.query), rotation.apply(seen.key), seen.scaling, seen.window, None)
    )
    for one, other in zip(plain.grams(), rotated.grams(), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)
