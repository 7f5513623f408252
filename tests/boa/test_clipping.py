"""The search for a clip ratio against a loop over the ratios."""

import pytest
import torch
from torch import Tensor

from rotoboa.boa.activations import DynamicQuantizer
from rotoboa.boa.clipping import RATIOS, search_clip

from .problems import random


def _cost(quantizer: DynamicQuantizer, x: Tensor, reader: Tensor) -> float:
    """||W q(x) - W x||^2, head by head."""
    heads = zip(x.view(-1, *x.shape[-2:]), reader.view(-1, *reader.shape[-2:]), strict=True)
    return sum(float(((quantizer(part) - part) @ weight.T).square().sum()) for part, weight in heads)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("heads", [None, 3])
def test_least_error_of_what_reads_it(heads: int | None, bits: int, symmetric: bool) -> None:
    batch = () if heads is None else (heads,)
    for seed in range(3):
        x, reader = random(*batch, 40, 16, seed=seed) ** 3, random(*batch, 8, 16, seed=seed + 10)
        chosen = search_clip(DynamicQuantizer(bits, symmetric, 0.5), x, reader.transpose(-1, -2) @ reader)
        assert (chosen.bits, chosen.symmetric) == (bits, symmetric)
        costs = {ratio: _cost(DynamicQuantizer(bits, symmetric, ratio), x, reader) for ratio in RATIOS}
        assert costs[chosen.clip] == min(costs.values())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [4, 8, 16])
def test_groups_keep_their_size(group: int, symmetric: bool) -> None:
    """One ratio for all groups, by the error of all of them together."""
    x, reader = random(40, 16, seed=1) ** 3, random(8, 16, seed=11)
    chosen = search_clip(DynamicQuantizer(3, symmetric, 0.5, group), x, reader.T @ reader)
    assert chosen.group_size == group
    costs = {ratio: _cost(DynamicQuantizer(3, symmetric, ratio, group), x, reader) for ratio in RATIOS}
    assert costs[chosen.clip] == min(costs.values())


def test_metric_matters() -> None:
    """Only one channel is read: an outlier in it must be kept whole, and an outlier elsewhere given up."""
    x = random(50, 16) * 0.1
    x[:, 0] = 5
    metric = torch.zeros(16, 16, dtype=torch.float64)
    metric[0, 0] = 1
    assert search_clip(DynamicQuantizer(4), x, metric).clip == 1.0
    metric = torch.eye(16, dtype=torch.float64)
    metric[0, 0] = 0
    assert search_clip(DynamicQuantizer(4), x, metric).clip == min(RATIOS)
