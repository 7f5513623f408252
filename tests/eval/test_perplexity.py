"""Perplexity block by block is perplexity."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from rotoboa.eval.perplexity import (
    ORIGINAL,
    BlockFunction,
    Divergence,
    States,
    last_states,
    part_sums,
    summary,
)
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.decoder import Decoder

from .scoring import scores


def tokens(windows: int, length: int, vocabulary: int = 2048) -> Tensor:
    return torch.randint(vocabulary, (windows, length), generator=torch.Generator().manual_seed(2))


def perplexity(
    windows: Tensor, embed: BlockFunction, blocks: Iterable[BlockFunction], logits: BlockFunction, **options: Any
) -> float:
    return scores(windows, last_states(windows, embed, blocks, logits, **options))[0]


def streamed(folder: Path, windows: Tensor, batch: int) -> float:
    checkpoint = Checkpoint(folder)
    decoder = Decoder(checkpoint.config)
    blocks = (partial(decoder.run, decoder.block(i, checkpoint.block(i))) for i in range(decoder.shape.blocks))
    outer = checkpoint.outer_layers()
    return perplexity(windows, partial(decoder.embed, outer), blocks, decoder.logits(outer), batch=batch)


@torch.no_grad()
def plain(folder: Path, windows: Tensor) -> float:
    """The way of GPTQ's code: the loss of each window by the whole model, its mean over all windows."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = [float(model(window[None], labels=window[None]).loss) for window in windows]
    return math.exp(sum(losses) / len(losses))


def _plain(
    windows: Tensor, embedding: Tensor, blocks: Iterable[Callable[[Tensor], Tensor]], head: Tensor, **options: Any
) -> float:
    """Without a final norm."""
    return perplexity(windows, lambda ids: embedding[ids], blocks, lambda hidden: hidden @ head.T, **options)


def test_is_that_of_the_whole_model(llama: Path) -> None:
    windows = tokens(5, 60)
    expected = plain(llama, windows)
    assert streamed(llama, windows, 2) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 5, 8])
def test_batch_does_not_matter(llama: Path, batch: int) -> None:
    windows = tokens(5, 60)
    assert streamed(llama, windows, batch) == pytest.approx(streamed(llama, windows, 2), rel=1e-6)


def test_windows_do_not_see_each_other(llama: Path) -> None:
    windows = tokens(4, 40)
    apart = [math.log(streamed(llama, window[None], 8)) for window in windows]
    assert streamed(llama, windows, 4) == pytest.approx(math.exp(sum(apart) / 4), rel=1e-6)


@pytest.mark.parametrize("vocabulary", [7, 100])
def test_a_uniform_model_has_the_vocabulary_as_perplexity(vocabulary: int) -> None:
    windows = tokens(3, 20, vocabulary)
    found = _plain(windows, torch.randn(vocabulary, 8), [], torch.zeros(vocabulary, 8))
    assert found == pytest.approx(vocabulary, rel=1e-6)


def test_a_model_that_knows_the_next_token_has_perplexity_one() -> None:
    windows = torch.arange(12).repeat(2, 1)
    head = 100.0 * torch.eye(12).roll(1, 0)  # token i is followed by i + 1
    assert _plain(windows, torch.eye(12), [], head) == pytest.approx(1.0, abs=1e-6)


def test_a_hopeless_model_has_a_number_too() -> None:
    windows = torch.arange(12).repeat(2, 1)
    assert _plain(windows, torch.eye(12), [], 1e6 * torch.eye(12)) == math.inf
    assert math.isnan(_plain(windows, torch.eye(12), [], math.nan * torch.eye(12)))


def test_blocks_are_made_one_after_another_and_counted() -> None:
    events: list[str] = []

    def block(name: str, x: Tensor) -> Tensor:
        events.append(name)
        return x

    def blocks() -> Iterator[Callable[[Tensor], Tensor]]:
        for name in ("a", "b"):
            events.append(f"make {name}")
            yield partial(block, name)

    windows = tokens(3, 5, 10)
    _plain(
        windows,
        torch.randn(10, 4),
        blocks(),
        torch.randn(10, 4),
        batch=2,
        advance=lambda: events.append("done"),
    )
    assert events == ["make a", "a", "a", "done", "make b", "b", "b", "done"]


def test_bfloat16_hidden_states_stay_bfloat16() -> None:
    seen: list[torch.dtype] = []

    def block(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x

    embedding = torch.randn(10, 4).bfloat16()
    assert _plain(tokens(2, 5, 10), embedding, [block], embedding) > 1
    assert seen == [torch.bfloat16]


def test_windows_that_are_shared_out_give_the_same() -> None:
    windows = tokens(5, 9, 7)

    def embed(ids: Tensor) -> Tensor:
        assert len(ids)
        return torch.nn.functional.one_hot(ids, 7).float()

    def states(some: Tensor) -> States:
        return last_states(some, embed, [lambda x: 3 * x.roll(1, -1)], lambda x: x, batch=2)

    shares = [windows[:2], windows[2:2], windows[2:]]  # one has none
    sums = [part for share in shares for part in part_sums(share, {"a": states(share)}, states(share))["a"]]
    assert summary(sums, 5 * 8, True) == scores(windows, states(windows), states(windows))


def test_models_are_scored_together_and_the_original_once() -> None:
    windows, calls = tokens(2, 9, 7), dict.fromkeys("abo", 0)

    def states(name: str, factor: float) -> States:
        def logits(x: Tensor) -> Tensor:
            calls[name] += 1
            return factor * x

        return last_states(windows, lambda ids: torch.nn.functional.one_hot(ids, 7).float(), [], logits, batch=2)

    models, original = {"a": states("a", 2), "b": states("b", 3)}, states("o", 4)
    found = part_sums(windows, models, original)
    assert calls == {"a": 2, "b": 2, "o": 2}, "a part is a window here"
    for name, of_model in models.items():
        assert summary(found[name], 2 * 8, True) == scores(windows, of_model, original)
    assert summary(found[ORIGINAL], 2 * 8, True) == (scores(windows, original)[0], Divergence(0.0, 1.0))
