"""Clip ratios of activations and cache, chosen on calibration data by the error that they leave in a layer's output."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .activations import DynamicQuantizer
from .stopwatch import stage

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
TOKENS = 4096
"""How many tokens a clip ratio is chosen on, at most, or whole sequences with no fewer: spread over all of the text."""


def clip_costs(quantizer: DynamicQuantizer, x: Tensor, metric: Tensor) -> Tensor:
    """What each of `RATIOS` costs: the sum over heads and tokens of e M e^T w with e = q(x) - x, w = m / (x M x^T + m).

    x M x^T is what a token puts out, squared, and m the median of that over the tokens of a head that put out
    anything. So a token of a common size counts by its error, and one that is far larger by its error relative to its
    own size: no single token decides, however large. A dynamic quantizer's error is as large as what it rounds, and
    the first token of a sequence may be a thousand times the others, so that the plain sum would be its alone.

    That is what becomes of errors. Between layers RMSNorm divides each token by the size of its residual stream, so
    that of the inputs of Q, K, V, gate and up, and of what O and down add to the stream, only the relative error of a
    token is seen. Smaller tokens are not counted up: what they put out is added to something larger. Heads, whose
    outputs are added to each other or compared, keep their weights.

    Args:
        x: (..., tokens, c), heads before tokens; there may be no tokens.
        metric: M, (..., c, c), one for each head or for all: W^T W of the layers that read x, summed, and Q^T Q for
            keys, whose errors are those of the logits.

    Returns:
        (ratios,) in float64, to be added up over batches.
    """
    if not x.numel():
        return torch.zeros(len(RATIOS), dtype=torch.float64, device=x.device)

    def size(part: Tensor) -> Tensor:
        return ((part @ metric) * part).sum(-1)

    own = size(x).clamp_min_(0)
    # Not torch.median, which has no order on CUDA that is the same for certain.
    middle = ((own == 0).sum(-1, keepdim=True) + own.shape[-1] - 1) // 2
    typical = own.sort(-1).values.gather(-1, middle)
    weight = typical / (own + typical).clamp_min_(torch.finfo(own.dtype).tiny)
    costs = [(size(replace(quantizer, clip=ratio)(x) - x) * weight).sum(dtype=torch.float64) for ratio in RATIOS]
    return torch.stack(costs)


@dataclass
class ClipCosts:
    """Costs of all ratios, (ratios,) in float64, over batches; a kind of `totals.Statistics`."""

    costs: Tensor

    @classmethod
    def on(cls, device: torch.device) -> ClipCosts:
        """Those of nothing."""
        return cls(torch.zeros(len(RATIOS), dtype=torch.float64, device=device))

    @stage("clip search")
    def add(self, quantizer: DynamicQuantizer, x: Tensor, metric: Tensor) -> None:
        """Arguments as `clip_costs` has them."""
        self.costs += clip_costs(quantizer, x, metric)

    def sums(self) -> dict[str, list[Tensor]]:
        """As `Statistics` has it."""
        return {"costs": [self.costs]}

    @stage("clip search")
    def choose(self, quantizer: DynamicQuantizer) -> DynamicQuantizer:
        """The quantizer with the ratio that costs least."""
        return replace(quantizer, clip=RATIOS[int(self.costs.argmin())])


def spread_tokens(tokens: range, length: int, count: int) -> range:
    """Those of `tokens` that clip ratios are chosen on: every n-th of all, at every position of a sequence alike.

    Args:
        tokens: a batch's, numbered through all sequences.
        length: of a sequence.
        count: of all sequences.

    Example: of 4 sequences of 2,048 tokens every third, not every second, which would see even positions alone.
    """
    step = max(1, -(-count * length // TOKENS))
    while math.gcd(step, length) > 1:
        step += 1
    return range(-(-tokens.start // step) * step, tokens.stop, step)


def spread_sequences(sequences: range, length: int, count: int) -> Iterator[int]:
    """Those of a batch of `sequences`, numbered through all `count`, that have `TOKENS` tokens together, and no fewer.

    Example: of 32 sequences of 2,048 tokens 0 and 16.
    """
    some = min(count, -(-TOKENS // length))
    return (i for i in (k * count // some for k in range(some)) if i in sequences)
