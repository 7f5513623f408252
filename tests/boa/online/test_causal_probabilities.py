"""Causal probabilities against loops, and those that transformers and attention itself compute with."""

import math

import pytest
import torch
from transformers.models.llama.modeling_llama import eager_attention_forward

from rotoboa.boa.online.attention import AttentionInputs, attention_forward, causal_probabilities, set_attention

from ..toy_attention import GROUPS, KEY_HEADS, LENGTH, SCALING, SEQUENCES, Toy, attention_module, softly


@pytest.mark.parametrize("group", GROUPS)
def test_causal_probabilities(group: int) -> None:
    toy = Toy(group, rope=True)
    for s in range(SEQUENCES):
        a = causal_probabilities(toy.seen, s, 0, LENGTH).view(KEY_HEADS, group, LENGTH, LENGTH).flatten(0, 1)
        for h in range(toy.heads):
            torch.testing.assert_close(a[h], softly(toy, s, h), rtol=0, atol=1e-14)
        assert a.triu(1).abs().max() == 0, "a query attends to what comes after it"


@pytest.mark.parametrize("group", GROUPS)
def test_causal_probabilities_in_parts(group: int) -> None:
    """Query positions start .. stop - 1 over the keys before stop: rows of the whole."""
    toy = Toy(group, rope=True)
    whole = causal_probabilities(toy.seen, 1, 0, LENGTH).unflatten(1, (group, LENGTH))
    for start, stop in ((0, 3), (3, 5), (5, LENGTH), (6, 7)):
        part = causal_probabilities(toy.seen, 1, start, stop)
        assert part.shape == (KEY_HEADS, group * (stop - start), stop)
        part = part.unflatten(1, (group, -1))
        torch.testing.assert_close(part, whole[:, :, start:stop, :stop], rtol=0, atol=1e-15)
        assert whole[:, :, start:stop, stop:].abs().sum() == 0


@pytest.mark.parametrize("group", GROUPS)
def test_causal_probabilities_are_those_of_transformers(group: int) -> None:
    """Its eager attention, whose softmax is float32's: 1e-6."""
    toy = Toy(group, rope=True)
    mask = torch.full((LENGTH, LENGTH), -math.inf, dtype=torch.float64).triu(1)[None, None]
    value = toy.project(toy.w_v)
    module = attention_module(group)
    output, expected = eager_attention_forward(module, toy.query, toy.key, value, mask, SCALING)
    for s in range(SEQUENCES):
        a = causal_probabilities(toy.seen, s, 0, LENGTH).view(toy.heads, LENGTH, LENGTH)
        torch.testing.assert_close(a, expected[s], rtol=0, atol=1e-6)
        attended = (a @ value[s].repeat_interleave(group, 0)).transpose(0, 1)
        torch.testing.assert_close(attended, output[s], rtol=0, atol=1e-5)


@pytest.mark.parametrize("group", GROUPS)
def test_causal_probabilities_are_those_that_attention_uses(group: int) -> None:
    """The registered function, through SDPA in float64; and what its recorder sees is what it computes with."""
    toy = Toy(group, rope=True)
    value = toy.project(toy.w_v)
    recorded: list[AttentionInputs] = []
    module = attention_module(group)
    set_attention(module, None, recorded.append)
    output, _ = attention_forward(module, toy.query, toy.key, value, None, scaling=SCALING)
    for s in range(SEQUENCES):
        a = causal_probabilities(recorded[0], s, 0, LENGTH).view(toy.heads, LENGTH, LENGTH)
        attended = (a @ value[s].repeat_interleave(group, 0)).transpose(0, 1)
        torch.testing.assert_close(output[s], attended, rtol=0, atol=1e-13)


def test_causal_probabilities_in_chunks() -> None:
    """A chunk attends as a text of its own, whatever part of it is asked for."""
    toy = Toy(GROUPS[0], rope=True)
    whole = causal_probabilities(toy.seen._replace(chunk=3), 1, 0, LENGTH).unflatten(1, (-1, LENGTH))
    for start in range(0, LENGTH, 3):
        span = slice(start, min(start + 3, LENGTH))
        alone = toy.seen._replace(query=toy.seen.query[:, :, span], key=toy.seen.key[:, :, span])
        expected = causal_probabilities(alone, 1, 0, span.stop - start).unflatten(1, (-1, span.stop - start))
        torch.testing.assert_close(whole[:, :, span, span], expected, rtol=0, atol=1e-15)
        assert whole[:, :, span, :start].abs().sum() == 0
    part = causal_probabilities(toy.seen._replace(chunk=3), 1, 4, 7, 2).unflatten(1, (-1, 2))
    torch.testing.assert_close(part, whole[:, :, 4:7:2, :7], rtol=0, atol=1e-15)
