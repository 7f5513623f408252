"""Clip ratios of activations and cache, chosen on calibration data by the error that they leave in a layer's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .activations import DynamicQuantizer
from .stopwatch import stage

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


@stage("clip search")
def search_clip(
    quantizer: DynamicQuantizer,
    x: Tensor | None,
    metric: Tensor,
    sum_over_ranks: Callable[[Tensor], object] = lambda costs: None,
) -> DynamicQuantizer:
    """The quantizer with the ratio of `RATIOS` that minimises sum over tokens of e M e^T, e = q(x) - x.

    Args:
        x: (heads, tokens, c), or (tokens, c) for one; None on a rank that has none of the tokens.
        metric: M, (heads, c, c) or (c, c): W^T W of the layers that read x, summed; Q^T Q for keys.
        sum_over_ranks: sums a tensor in place over those who each have some of the tokens.
    """

    def cost(candidate: DynamicQuantizer) -> float:
        if x is None:
            return 0.0
        error = candidate(x) - x
        return float(((error @ metric) * error).sum())

    candidates = [replace(quantizer, clip=ratio) for ratio in RATIOS]
    costs = torch.tensor([cost(candidate) for candidate in candidates], dtype=torch.float64)
    sum_over_ranks(costs)
    return candidates[int(costs.argmin())]
