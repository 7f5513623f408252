"""Batches padded on the left, in every family: a prompt's logits and tokens are those that it has alone."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import rotoboa
from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.boa.online.attention import NAME, AttentionTransform, set_attention
from rotoboa.export.runtime.cache_hook import use_packed_cache
from rotoboa.export.runtime.sinks import first_positions
from rotoboa.models.families import family_for
from rotoboa.rotation.hadamard import Hadamard

# Without longrope: transformers lets the longest prompt of a batch choose the frequencies of all.
NAMES = ["llama-biases", "mistral", "qwen2", "qwen3", "phi3", "opt", "gemma2", "gemma3_text", "mixtral", "gpt_oss"]
BY_KIND = {"qwen2", "gemma2", "gemma3_text", "gpt_oss"}  # that take a mask for each kind of layer
SHORT, LONG = 14, 24
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def models(family_model: Callable[..., nn.Module]) -> Callable[[str, int], Any]:
    """models("gemma2", 2): in float64, keys and values in 4 bits but for two positions. Not to be changed."""

    @cache
    def make(name: str, sink: int) -> Any:
        model: Any = family_model(name, attention=NAME).double()
        family, quantizer = family_for(model.config, name), DynamicQuantizer(4, False, 0.95)
        for block in model.get_submodule(family.layers).children():
            module = block.get_submodule(family.attention)
            set_attention(module, AttentionTransform(Hadamard.of(module.head_dim), quantizer, quantizer, sink))
        decoder, _, layers = family.layers.rpartition(".")
        names = [family.attention] * model.config.num_hidden_layers
        use_packed_cache(model.get_submodule(decoder), layers, names)
        return model

    return make


def _batch() -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Two prompts, both in one batch, its mask and its positions."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 100, (1, length), generator=generator) for length in (SHORT, LONG)]
    batch = torch.cat([nn.functional.pad(prompts[0], (LONG - SHORT, 0), value=5), prompts[1]])
    mask = torch.ones_like(batch)
    mask[0, : LONG - SHORT] = 0
    return prompts, batch, mask, (mask.cumsum(-1) - 1).clamp_min(0)


def _seen(mask: Tensor, window: int | None) -> Tensor:
    """(batch, 1, length, length): true where a row sees a column."""
    rows = torch.arange(mask.shape[1])
    distance = rows[:, None] - rows[None]
    seen = (distance >= 0) & (distance < (window or LONG))
    return seen & mask.bool()[:, None, None]


def _masks(name: str, mask: Tensor, window: int | None) -> Iterator[Any]:
    """All forms in which a model takes a mask."""
    yield from (mask, mask.bool())
    for low in (None, float("-inf"), torch.finfo(torch.float64).min):
        full, sliding = _seen(mask, None), _seen(mask, window)
        if low is not None:
            full, sliding = (torch.zeros(x.shape, dtype=torch.float64).masked_fill(~x, low) for x in (full, sliding))
        yield {"full_attention": full, "sliding_attention": sliding} if name in BY_KIND else sliding


@torch.no_grad()
@pytest.mark.parametrize("sink", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_prompt_alone(models: Callable[[str, int], Any], name: str, sink: int) -> None:
    model, (prompts, batch, mask, positions) = models(name, sink), _batch()
    alone = [model(prompt, use_cache=False).logits[0] for prompt in prompts]

    def check(found: Tensor) -> None:
        assert found.isfinite().all()
        for row, expected in zip(found, alone, strict=True):
            assert (row[-len(expected) :] - expected).abs().max() < 1e-9 * expected.std()

    for given in _masks(name, mask, getattr(model.config, "sliding_window", None)):
        for use_cache in (False, True):
            check(model(batch, attention_mask=given, position_ids=positions, use_cache=use_cache).logits)
    caches: list[Callable[[], Any]] = [DynamicCache, lambda: DynamicCache(config=model.config)]
    if not (sink and getattr(model.config, "sliding_window", None)):  # stock layers with a window forget the sinks
        caches.append(lambda: StaticCache(model.config, max_cache_len=LONG + 8))
    for steps in ([7, 1, 1, 12, 3], [LONG]):
        for make in caches:
            past, parts, length = make(), [], 0
            for ids, own in zip(batch.split(steps, 1), positions.split(steps, 1), strict=True):
                length += ids.shape[1]
                options = {"attention_mask": mask[:, :length], "position_ids": own, "past_key_values": past}
                parts.append(model(ids, **options).logits)
            check(torch.cat(parts, 1))
    nothing = mask.clone()
    nothing[0] = 0
    assert model(batch, attention_mask=nothing).logits.isfinite().all()
    torch.testing.assert_close(model(prompts[1]).logits[0], alone[1])  # what was said of the batch is forgotten


@torch.no_grad()
@pytest.mark.parametrize("name", ["mistral", "gemma2", "opt"])
def test_generated_tokens_are_those_of_the_prompt_alone(models: Callable[[str, int], Any], name: str) -> None:
    model, (prompts, batch, mask, _) = models(name, 2), _batch()
    for options in ({}, {"use_cache": False}, {"num_beams": 3}):
        found = model.generate(batch, attention_mask=mask, **GREEDY, **options)
        for row, prompt in zip(found, prompts, strict=True):
            alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY, **options)
            assert torch.equal(row[LONG:], alone[0, prompt.shape[1] :])


@torch.no_grad()
def test_a_run_of_gemma_2(save_family: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Soft caps and windows, through a whole run and the tokenizer, as a user has it."""
    small = {"calibration.sequence_length": 40, "weights.method": "rtn", "evaluation.windows": 2}
    settings = {"model": str(save_family(tmp_path / "model", "gemma2")), "output": tmp_path / "run", **small}
    rotoboa.quantize(make_recipe("w4a4kv4", settings | {"evaluation.baseline": False, "activations.bits": 16}))
    model, tokenizer = rotoboa.load(tmp_path / "run", dtype=torch.float32)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    prompts = ["def f():", "a longer prompt than the other"]
    batch = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    assert batch["attention_mask"][0].sum() == len(prompts[0])
    assert model(**batch).logits.isfinite().all()
    found = model.generate(**batch, **GREEDY)[:, -5:]
    for row, prompt in zip(found, prompts, strict=True):
        alone = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        assert torch.equal(row, model.generate(**alone, **GREEDY)[0, -5:])


def test_where_sequences_begin() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]])
    expected = torch.tensor([2, 0, 4])
    seen = mask.bool()[:, None, None] & torch.ones(4, 4).tril().bool()
    numbers = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for form in (mask, mask.bool(), mask.float(), seen, numbers, {"full_attention": seen}, {"sliding_attention": mask}):
        starts = first_positions(form)
        assert starts is not None and torch.equal(starts, expected)
    assert first_positions(None) is None and first_positions({"full_attention": None}) is None
