"""Perplexity, block by block: only one decoder block is in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

BlockFunction = Callable[[Tensor], Tensor]


@torch.no_grad()
def perplexity(
    tokens: Tensor,
    embedding: Tensor,
    blocks: Iterable[BlockFunction],
    norm: nn.Module,
    head: Tensor,
    *,
    batch: int = 8,
    advance: Callable[[], None] = lambda: None,
) -> float:
    """exp of the mean negative log-likelihood of every token but the first of its window.

    Args:
        tokens: (windows, length).
        embedding: (vocabulary, hidden), in the dtype to compute in.
        blocks: functions (batch, length, hidden) -> the same, made one after another.
        norm: the final norm.
        head: (vocabulary, hidden).
        batch: windows computed at a time.
        advance: called after each block.

    Windows do not see each other, as in the papers' protocol (GPTQ, QuaRot, BoA).
    """
    device = embedding.device
    hidden = torch.empty(*tokens.shape, embedding.shape[1], dtype=embedding.dtype)
    for part, ids in zip(hidden.split(batch), tokens.split(batch), strict=True):
        part.copy_(embedding[ids.to(device)])
    for block in blocks:
        for part in hidden.split(batch):
            part.copy_(block(part.to(device)))
        advance()
    total = 0.0
    for part, ids in zip(hidden.split(1), tokens.split(1), strict=True):  # logits are large: one window of them
        logits = norm(part[:, :-1].to(device)) @ head.T
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), ids[:, 1:].to(device).flatten(), reduction="sum"
        )
        total += float(losses)
    mean = total / (tokens.shape[0] * (tokens.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf if mean < math.inf else mean
