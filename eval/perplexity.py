"""Perplexity and divergence, block by block: only one decoder block is in memory at a time, and the logits of no
more than a few hundred positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BlockFunction = Callable[[Tensor], Tensor]
POSITIONS = 512  # whose logits are held at a time: of 128,256 tokens they take 250 MiB, in each of a few tensors
ORIGINAL = "original"  # the name of the model that the others are held against


@dataclass(frozen=True)
class States:
    """A model's last hidden states over windows of text: all that its predictions need besides the output layer.

    Attributes:
        hidden: (windows, length, hidden), in the dtype of the computation, wherever `empty` put it.
        logits: (length, hidden) -> (length, vocabulary), by the final norm and the head.
        device: where `logits` computes.
    """

    hidden: Tensor
    logits: BlockFunction
    device: torch.device | str = "cpu"

    def log_probabilities(self, window: int, tokens: slice = slice(None)) -> Tensor:
        """(tokens, vocabulary) float32: of the token after each of a window's tokens but its last, or some of them."""
        return self.logits(self.hidden[window, :-1][tokens].to(self.device)).float().log_softmax(-1)


@dataclass(frozen=True)
class Divergence:
    """How far a model's predictions are from those of the original, over the tokens that perplexity is taken over.

    Attributes:
        kl: mean of KL(original || model) of the distribution of the next token, in nats; 0 is the same model.
        top1: part of the tokens for which both hold the same next token for the most likely; 1 is the same model.
    """

    kl: float
    top1: float


@torch.no_grad()
def last_states(
    tokens: Tensor,
    embed: BlockFunction,
    blocks: Iterable[BlockFunction],
    logits: BlockFunction,
    *,
    batch: int = 8,
    device: torch.device | str = "cpu",
    advance: Callable[[], None] = lambda: None,
    empty: Callable[..., Tensor] = torch.empty,
    release: Callable[[], None] = lambda: None,
) -> States:
    """The last hidden states of a model that is made one block after another.

    Args:
        tokens: (windows, length).
        embed: token ids (batch, length) -> (batch, length, hidden), in the dtype to compute in.
        blocks: functions (batch, length, hidden) -> the same, made one after another.
        logits: as in `States`.
        batch: windows computed at a time.
        device: where `blocks` and `logits` compute.
        advance: called after each block.
        empty: makes the tensor of hidden states of all windows, by its size and `dtype`.
        release: called after each batch, so that what lies in files need not stay in memory.
    """
    first = embed(tokens[:1]) if len(tokens) else torch.empty(0, tokens.shape[1], 1)  # other ranks have the windows
    hidden = empty(*tokens.shape, first.shape[-1], dtype=first.dtype)
    parts = hidden.split(batch) if len(tokens) else ()
    for part, ids in zip(parts, tokens.split(batch), strict=False):
        part.copy_(embed(ids))
        release()
    for block in blocks:
        for part in parts:
            part.copy_(block(part.to(device)))
            release()
        advance()
    return States(hidden, logits, device)


@torch.no_grad()
def part_sums(
    tokens: Tensor,
    models: Mapping[str, States],
    original: States | None = None,
    *,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[tuple[float, float, float]]]:
    """Sums over tokens of log-likelihood, of KL from the original and of equal top-1, in parts of a window, by model.

    The logits of the original are found once for all: of a large vocabulary they are most of the work.

    Args:
        tokens: (windows, length).
        models: states over these tokens by the name of the model.
        original: those of the model that they were made from. It is in the result too, as `ORIGINAL`; without it the
            latter two sums are 0.
        advance: called after each part.
    """
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in models}
    if original is not None:
        found[ORIGINAL] = []
    for window, part, ids in _parts(tokens):
        expected = None if original is None else original.log_probabilities(window, part)
        for name, states in models.items():
            predicted = states.log_probabilities(window, part)
            kl = same = 0.0
            if expected is not None:
                # A token's terms nearly cancel: their sum is float32 over the vocabulary, and float64 from there.
                kl = float((expected.exp() * (expected - predicted)).sum(-1).sum(dtype=torch.float64))
                same = float((expected.argmax(-1) == predicted.argmax(-1)).sum())
            found[name].append((_likelihood(predicted, ids), kl, same))
        if expected is not None:
            found[ORIGINAL].append((_likelihood(expected, ids), 0.0, float(len(ids))))
        advance()
    return found


def _likelihood(log_probabilities: Tensor, ids: Tensor) -> float:
    return float(log_probabilities.gather(1, ids[:, None].to(log_probabilities.device)).sum(dtype=torch.float64))


def summary(sums: Iterable[Sequence[float]], count: int, diverged: bool) -> tuple[float, Divergence | None]:
    """Perplexity of a model, and its divergence from the original where the sums have that.

    Perplexity is exp of the mean negative log-likelihood of every token but the first of its window. Windows do not
    see each other, as in the papers' protocol (GPTQ, QuaRot, BoA). The divergence is the KL divergence and the top-1
    agreement that llama.cpp's `perplexity` reports.

    Args:
        sums: a model's `part_sums` of all windows, in order, whoever found them.
        count: how many tokens were predicted.
        diverged: whether the original was given.
    """
    likelihood, kl, same = (sum(column) for column in zip(*sums, strict=True))
    mean = -likelihood / count
    perplexity = math.exp(mean) if mean < 700 else math.inf if mean < math.inf else mean
    return perplexity, Divergence(kl / count, same / count) if diverged else None


def _parts(tokens: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """A window, some of its positions, and the tokens after them: logits are large."""
    for window, ids in enumerate(tokens):
        for start in range(0, len(ids) - 1, POSITIONS):
            part = slice(start, min(start + POSITIONS, len(ids) - 1))
            yield window, part, ids[1:][part]
