"""Sums over tokens against brute force in float64, and what statistics refuse."""

import pytest
import torch

from rotoboa.boa.objective import grams
from rotoboa.boa.objective.grams import add_gram, mirrored
from rotoboa.boa.objective.statistics import AttentionStatistics, InputStatistics

from ..problems import random
from ..toy_attention import Toy


def test_input_statistics() -> None:
    """X_q X_q^T, (X_f - X_q) X_q^T and (Y - W X_q) X_q^T, token by token, in batches of any shape."""
    full, quantized, wanted = random(3, 4, 5, seed=1), random(3, 4, 5, seed=2), random(3, 4, 2, seed=3)
    weight = random(2, 5, seed=4)
    h_in, residual = torch.zeros(2, 5, 5, dtype=torch.float64)
    drift = torch.zeros(2, 5, dtype=torch.float64)
    for s in range(3):
        for t in range(4):
            h_in += torch.outer(quantized[s, t], quantized[s, t])
            residual += torch.outer(full[s, t] - quantized[s, t], quantized[s, t])
            drift += torch.outer(wanted[s, t] - weight @ quantized[s, t], quantized[s, t])
    statistics = InputStatistics()
    statistics.add(full[:2], quantized[:2], wanted[:2])
    statistics.add(full[2], quantized[2], wanted[2])
    objective = statistics.objective(weight)
    assert objective.residual is not None and objective.drift is not None and objective.h_out is None
    for found, expected in ((objective.h_in, h_in), (objective.residual, residual), (objective.drift, drift)):
        torch.testing.assert_close(found, expected[None], rtol=0, atol=1e-13)


def test_input_statistics_without_drift() -> None:
    statistics = InputStatistics()
    statistics.add(random(3, 5), random(3, 5))
    assert statistics.objective().drift is None


def test_adding_does_not_write_to_what_was_given() -> None:
    toy = Toy(2, rope=True)
    seen = toy.seen
    copies = [tensor.clone() for tensor in (toy.x, seen.query, seen.key)]
    attended, weight = toy.attended, toy.w_v.flatten(0, 1)
    copies += [attended.clone(), weight.clone()]
    statistics, inputs = AttentionStatistics(), InputStatistics()
    for _ in range(2):
        statistics.add_grams(seen.query, seen.key)
        statistics.add_values(toy.x, attended, seen, weight)
        inputs.add(toy.x, toy.x)
    given = (toy.x, seen.query, seen.key, attended, weight)
    assert all(torch.equal(a, b) for a, b in zip(copies, given, strict=True))


def test_nothing_seen() -> None:
    with pytest.raises(ValueError, match="no calibration tokens"):
        InputStatistics().objective()
    with pytest.raises(ValueError, match="no calibration tokens"):
        AttentionStatistics().grams()
    with pytest.raises(ValueError, match="no calibration tokens"):
        AttentionStatistics().value_objective(random(5, 8))


def test_wanted_outputs_need_the_weight() -> None:
    statistics = InputStatistics()
    statistics.add(None, random(3, 5), random(3, 2))
    with pytest.raises(ValueError, match="weight is not given"):
        statistics.objective()


@pytest.mark.parametrize("columns", [3, 64, 65, 300])
def test_grams_by_half(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grams, "MIRROR", 50)
    x = random(2, 9, columns)
    total = torch.zeros(2, columns, columns, dtype=torch.float64)
    for part in x.split(4, 1):
        add_gram(total, part)
    torch.testing.assert_close(mirrored(total), x.transpose(1, 2) @ x, rtol=0, atol=1e-12)
