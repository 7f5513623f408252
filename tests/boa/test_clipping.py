"""The search for a clip ratio against a loop over heads and tokens, and what it is chosen on."""

import statistics

import pytest
import torch
from torch import Tensor

from rotoboa.boa.activations import DynamicQuantizer
from rotoboa.boa.clipping import RATIOS, TOKENS, ClipCosts, clip_costs, spread_sequences, spread_tokens

from .problems import random


def _cost(quantizer: DynamicQuantizer, x: Tensor, reader: Tensor) -> float:
    """By its definition: ||W q(x) - W x||^2 of a token, times m / (||W x||^2 + m), head by head."""
    cost = 0.0
    for part, weight in zip(x.view(-1, *x.shape[-2:]), reader.view(-1, *reader.shape[-2:]), strict=True):
        sizes = [float((weight @ token).square().sum()) for token in part]
        middle = statistics.median_low([size for size in sizes if size])
        for token, size in zip(part, sizes, strict=True):
            error = float((weight @ (quantizer(token) - token)).square().sum())
            cost += error * middle / (size + middle)
    return cost


def _choose(quantizer: DynamicQuantizer, *parts: tuple[Tensor, Tensor]) -> DynamicQuantizer:
    costs = ClipCosts.on(torch.device("cpu"))
    for x, metric in parts:
        costs.add(quantizer, x, metric)
    return costs.choose(quantizer)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("heads", "tokens"), [(None, 40), (3, 40), (2, 1), (1, 31)])
def test_costs_are_the_definition(heads: int | None, tokens: int, bits: int, symmetric: bool) -> None:
    batch = () if heads is None else (heads,)
    for seed in range(3):
        x, reader = random(*batch, tokens, 16, seed=seed) ** 3, random(*batch, 8, 16, seed=seed + 10)
        x[..., 5:9, :] = 0
        metric = reader.transpose(-1, -2) @ reader
        quantizer = DynamicQuantizer(bits, symmetric, 0.5)
        expected = [_cost(DynamicQuantizer(bits, symmetric, ratio), x, reader) for ratio in RATIOS]
        found = clip_costs(quantizer, x, metric)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
        chosen = _choose(quantizer, (x, metric))
        assert (chosen.bits, chosen.symmetric) == (bits, symmetric)
        assert chosen.clip == RATIOS[expected.index(min(expected))]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [4, 8, 16])
def test_groups_keep_their_size(group: int, symmetric: bool) -> None:
    """One ratio for all groups, by the error of all of them together."""
    x, reader = random(40, 16, seed=1) ** 3, random(8, 16, seed=11)
    chosen = _choose(DynamicQuantizer(3, symmetric, 0.5, group), (x, reader.T @ reader))
    assert chosen.group_size == group
    costs = {ratio: _cost(DynamicQuantizer(3, symmetric, ratio, group), x, reader) for ratio in RATIOS}
    assert costs[chosen.clip] == min(costs.values())


def test_metric_matters() -> None:
    """Only one channel is read: an outlier in it must be kept whole, and an outlier elsewhere given up."""
    x = random(50, 16) * 0.1
    x[:, 0] = 5
    metric = torch.zeros(16, 16, dtype=torch.float64)
    metric[0, 0] = 1
    assert _choose(DynamicQuantizer(4), (x, metric)).clip == 1.0
    metric = torch.eye(16, dtype=torch.float64)
    metric[0, 0] = 0
    assert _choose(DynamicQuantizer(4), (x, metric)).clip == min(RATIOS)


@pytest.mark.parametrize("heads", [(), (3,)])
def test_a_massive_token_decides_nothing(heads: tuple[int, ...]) -> None:
    """A thousand times the others, and one channel of it, so that by itself it would have the whole range."""
    x, metric = random(*heads, 200, 32, seed=1), torch.eye(32, dtype=torch.float64)
    for bits in (2, 3, 4):
        quantizer = DynamicQuantizer(bits)
        without = _choose(quantizer, (x, metric))
        assert without.clip < 1
        massive = x.clone()
        massive[..., 0, :] *= 1e-3
        massive[..., 0, 7] = 1000 * x.norm(dim=-1).mean()
        assert _choose(quantizer, (massive, metric)).clip == without.clip
        plain = [float((DynamicQuantizer(bits, clip=ratio)(massive) - massive).square().sum()) for ratio in RATIOS]
        assert plain[0] == min(plain), "by the plain sum it would decide"


def test_costs_of_batches_add_up() -> None:
    """Batches without tokens, and tokens that are zero, cost nothing."""
    x, metric = random(3, 40, 16), torch.eye(16, dtype=torch.float64)
    costs = ClipCosts.on(torch.device("cpu"))
    for part in (x[0], x[1, :0], 0 * x[1], x[2]):
        costs.add(DynamicQuantizer(3), part, metric)
    expected = clip_costs(DynamicQuantizer(3), x[[0, 2]], metric)
    torch.testing.assert_close(costs.costs, expected, rtol=1e-12, atol=0)
    assert ClipCosts.on(torch.device("cpu")).choose(DynamicQuantizer(3)).clip == RATIOS[0]


@pytest.mark.parametrize(("length", "count"), [(512, 128), (2048, 128), (2047, 33), (100, 7), (4096, 4), (20000, 3)])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_tokens_and_sequences_are_spread_over_all(length: int, count: int, batch: int) -> None:
    """The same whatever the batches are, every sequence and part of it alike, no more than there are to be."""
    tokens, sequences = [], []
    for start in range(0, count, batch):
        stop = min(start + batch, count)
        tokens += spread_tokens(range(start * length, stop * length), length, count)
        sequences += spread_sequences(range(start, stop), length, count)
    step = tokens[1]
    assert tokens == list(range(0, count * length, step))
    assert min(count * length, TOKENS) / 1.5 <= len(tokens) <= TOKENS
    assert {token // length for token in tokens} == set(range(count))
    firsts = sum(token % length == 0 for token in tokens)
    assert firsts <= -(-count // step), "the first token of a sequence is seen as often as others"
    assert len(sequences) == min(count, -(-TOKENS // length)) and len(set(sequences)) == len(sequences)
    gaps = {b - a for a, b in zip([*sequences, count], [*sequences[1:], count], strict=False)} - {0}
    assert sequences[0] == 0 and max(gaps) - min(gaps) <= 1
