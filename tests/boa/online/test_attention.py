"""Attention with a window and with capped logits, and the probabilities that values are weighed by."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.models.gpt_oss import modeling_gpt_oss

from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.boa.online.attention import (
    AttentionInputs,
    AttentionTransform,
    attention_forward,
    causal_probabilities,
    seen_mass,
)
from rotoboa.boa.online.products import capped_attention
from rotoboa.errors import InputError
from rotoboa.rotation.hadamard import Hadamard

from ..problems import random
from ..toy_attention import attention_module

BATCH, HEADS, GROUPS, LENGTH, SIZE = 2, 4, 2, 17, 8
MODULE = attention_module(HEADS // GROUPS, SIZE)


def _inputs(length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    query = 2 * random(BATCH, HEADS, length, SIZE, seed=0)
    return query, 2 * random(BATCH, GROUPS, LENGTH, SIZE, seed=1), random(BATCH, GROUPS, LENGTH, SIZE, seed=2)


def _mask(window: int | None) -> Tensor:
    """(1, 1, length, length), by its definition: true where row i sees column j."""
    rows = [[j <= i and (window is None or i - j < window) for j in range(LENGTH)] for i in range(LENGTH)]
    return torch.tensor(rows)[None, None]


def _eager(window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Gemma 2's own, in float64: output (batch, length, heads, size) and probabilities."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    hidden = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.float64).masked_fill(~_mask(window), float("-inf"))
    return eager_attention_forward(MODULE, *_inputs(), hidden, scaling=0.3, softcap=softcap)


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_is_that_of_transformers(window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = _eager(window, softcap, monkeypatch)
    options: dict[str, Any] = {"scaling": 0.3, "softcap": softcap, "sliding_window": window}
    found, _ = attention_forward(MODULE, *_inputs(), _mask(window), **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if window is None:
        unmasked, _ = attention_forward(MODULE, *_inputs(), None, **options)
        torch.testing.assert_close(unmasked, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_probabilities(window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics of values weigh by what attention does, in every chunk of queries."""
    _, probabilities = _eager(window, softcap, monkeypatch)
    seen = AttentionInputs(*_inputs()[:2], 0.3, window, softcap)
    for start, stop in ((0, 4), (4, 11), (11, LENGTH)):
        for index in range(BATCH):
            found = causal_probabilities(seen, index, start, stop).view(HEADS, stop - start, stop)
            torch.testing.assert_close(found, probabilities[index, :, start:stop, :stop], rtol=0, atol=1e-12)


def test_probabilities_with_a_bias_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """ALiBi's, of each head: as a mask of numbers has it."""
    slopes = 2.0 ** -torch.arange(1, HEADS + 1).double()
    bias = (slopes[:, None] * torch.arange(LENGTH)).view(1, HEADS, 1, LENGTH)
    query, key, _ = _inputs()
    keys = key.repeat_interleave(HEADS // key.shape[1], 1)
    hidden = torch.ones(LENGTH, LENGTH).triu(1).bool()
    expected = (query @ keys.transpose(2, 3) * 0.3 + bias).masked_fill(hidden, float("-inf")).softmax(-1)
    for start, stop in ((0, 4), (4, LENGTH)):
        found = causal_probabilities(AttentionInputs(query, key, 0.3, bias=bias), 1, start, stop)
        wanted = expected[1, :, start:stop, :stop]
        torch.testing.assert_close(found.view(HEADS, stop - start, stop), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sink", [0, 1, 5, LENGTH, 40])
def test_keys_and_values_of_the_first_positions_are_not_rounded(sink: int) -> None:
    query, key, value = _inputs()
    rotation, quantizer = Hadamard.of(SIZE), DynamicQuantizer(2, False, 0.9)
    found = AttentionTransform(rotation, quantizer, replace(quantizer, clip=0.8), sink)(query, key, value)
    assert torch.equal(found[0], rotation.apply(query))
    for part, exact, clip in ((found[1], rotation.apply(key), 0.9), (found[2], value, 0.8)):
        for position in range(LENGTH):
            one = exact[:, :, position]
            expected = one if position < sink else replace(quantizer, clip=clip)(one)
            assert torch.equal(part[:, :, position], expected)


@pytest.mark.parametrize("sink", [0, 5])
def test_keys_are_rounded_beside_their_center(sink: int) -> None:
    query, key, value = _inputs()
    rotation, quantizer = Hadamard.of(SIZE), DynamicQuantizer(2, False, 0.9)
    center = 3 * random(GROUPS, SIZE, seed=4)
    transform = AttentionTransform(rotation, quantizer, quantizer, sink, centered=True)
    plain = transform(query, key, value)
    found = replace(transform, center=center.flatten())(query, key, value)
    assert torch.equal(found[0], plain[0]) and torch.equal(found[2], plain[2]), "keys alone have a center"
    turned = rotation.apply(key)
    for head in range(GROUPS):
        exact = turned[:, head]
        expected = quantizer(exact[:, sink:] - center[head]) + center[head]
        assert torch.equal(found[1][:, head], torch.cat([exact[:, :sink], expected], 1))
    unrounded = replace(transform, key=None, center=center.flatten())(query, key, value)
    assert torch.equal(unrounded[1], turned), "what is not rounded is not changed"


@pytest.mark.parametrize("length", [1, 3])
def test_capped_attention_of_the_last_queries(length: int) -> None:
    """With a cache, queries are the last positions: without a mask the last query sees every key."""
    query, key, value = _inputs()
    whole = capped_attention(query, key, value, None, scaling=0.3, softcap=1.5)
    last = capped_attention(query[:, :, -length:], key, value, None, scaling=0.3, softcap=1.5)
    torch.testing.assert_close(last, whole[:, -length:], rtol=0, atol=1e-12)


def test_capped_attention_takes_a_mask_of_numbers() -> None:
    query, key, value = _inputs()
    numbers = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=torch.float64).masked_fill(~_mask(5), float("-inf"))
    expected = capped_attention(query, key, value, _mask(5), scaling=None, softcap=1.5)
    found = capped_attention(query, key, value, numbers, scaling=None, softcap=1.5)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def _numbers(mask: Tensor, dtype: torch.dtype, low: float) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, low)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("form", ["booleans", "minus infinity", "smallest", "smallest of float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_that_see_nothing(softcap: float | None, form: str, dtype: torch.dtype) -> None:
    """Padding on the left: the other rows are those of the sequence alone, these are finite, and so are gradients."""
    query, key, value = (part.to(dtype).requires_grad_() for part in _inputs())
    mask = _mask(5).repeat(BATCH, 1, 1, 1)
    mask[0, ..., :4] = False
    forms = {
        "minus infinity": lambda: _numbers(mask, dtype, float("-inf")),
        "smallest": lambda: _numbers(mask, dtype, torch.finfo(dtype).min),
        "smallest of float32": lambda: _numbers(mask, torch.float32, torch.finfo(torch.float32).min),
    }
    given = mask if form == "booleans" else forms[form]()
    found, _ = attention_forward(MODULE, query, key, value, given, scaling=0.3, softcap=softcap)
    first = (slice(1), slice(None), slice(4, None))
    alone, _ = attention_forward(
        MODULE, query[first], key[first], value[first], _mask(5)[..., 4:, 4:], scaling=0.3, softcap=softcap
    )
    torch.testing.assert_close(
        found[:1, 4:],
        alone,
        rtol=1e-2 if dtype != torch.float32 else 1e-5,
        atol=1e-2 if dtype != torch.float32 else 1e-5,
    )
    found.float().square().sum().backward()
    assert found.isfinite().all() and all(
        part.grad is not None and part.grad.isfinite().all() for part in (query, key, value)
    )


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_without_a_mask_later_keys_are_room_in_a_cache(softcap: float | None) -> None:
    """As transformers leaves the mask out for the prompt in a static cache."""
    query, key, value = _inputs()
    expected, _ = attention_forward(MODULE, query[:, :, :7], key, value, _mask(None)[..., :7, :], softcap=softcap)
    found, _ = attention_forward(MODULE, query[:, :, :7], key, value, None, softcap=softcap)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_mask_of_integers_is_refused(softcap: float | None) -> None:
    with pytest.raises(InputError, match=r"booleans or of numbers to add, and this one is of int64: give mask\.bool"):
        attention_forward(MODULE, *_inputs(), _mask(None).long(), softcap=softcap)


@pytest.mark.parametrize("window", [None, 5])
def test_sinks_are_those_of_transformers(window: int | None) -> None:
    """Output and probabilities of gpt-oss's own, with a mask of booleans, of numbers, and without."""
    module, sinks = attention_module(HEADS // GROUPS, SIZE), random(HEADS, seed=3)
    module.sinks = sinks
    hidden = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.float64).masked_fill(~_mask(window), -1e300)
    expected, a = modeling_gpt_oss.eager_attention_forward(module, *_inputs(), hidden, scaling=0.3)
    options: dict[str, Any] = {"scaling": 0.3, "s_aux": sinks, "sliding_window": window}
    for mask in (_mask(window), hidden, *([None] if window is None else [])):
        found, _ = attention_forward(module, *_inputs(), mask, **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    query, key, value = _inputs()
    last, _ = attention_forward(module, query[:, :, -1:], key, value, _mask(window)[:, :, -1:], **options)
    torch.testing.assert_close(last, expected[:, -1:], rtol=0, atol=1e-12)
    if window is None:  # one query sees every key
        last, _ = attention_forward(module, query[:, :, -1:], key, value, None, **options)
        torch.testing.assert_close(last, expected[:, -1:], rtol=0, atol=1e-12)
    seen = AttentionInputs(query, key, 0.3, window, sinks=sinks)
    for i in range(BATCH):
        mine = causal_probabilities(seen, i, 3, LENGTH, 2).unflatten(1, (HEADS // GROUPS, -1)).flatten(0, 1)
        torch.testing.assert_close(mine, a[i, :, 3::2], rtol=0, atol=1e-12)
    torch.testing.assert_close(seen_mass(seen), a.sum(-1).transpose(1, 2), rtol=0, atol=1e-12)
    assert a.sum(-1).min() < 0.6
