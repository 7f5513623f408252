"""Models with the packed cache compute what they compute without one, whoever made the cache and however it is fed."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, PreTrainedModel, StaticCache

import rotoboa
from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.boa.online.attention import NAME, AttentionTransform, set_attention
from rotoboa.export.runtime.cache import PackedLayer, PackedSlidingLayer, cache_bytes, packed_cache
from rotoboa.export.runtime.cache_hook import use_packed_cache
from rotoboa.rotation.hadamard import Hadamard

# The small Llama has key heads of 16, so 4 bits are two words. Activations of 16 bits: a token more or less in a
# product changes its last digits alone, and not the level of an activation.
SETTINGS: dict[str, dict[str, Any]] = {
    "kv4": {"cache.key_bits": 4, "cache.value_bits": 4},
    "k2v3": {"cache.key_bits": 2, "cache.value_bits": 3},
    "k8v16": {"cache.key_bits": 8, "cache.value_bits": 16},
    "fp8": {"cache.key_bits": 8, "cache.value_bits": 8, "cache.format": "fp8"},
    "fp8, as vLLM": {"cache.key_bits": 8, "cache.value_bits": 8, "cache.format": "fp8", "cache.served_by": "vllm"},
    "fp8, sink of 2": {"cache.key_bits": 8, "cache.value_bits": 8, "cache.format": "fp8", "cache.sink": 2},
    "kv3, sink of 3": {"cache.key_bits": 3, "cache.value_bits": 3, "cache.sink": 3},
    "k4v16, sink of 15": {"cache.key_bits": 4, "cache.value_bits": 16, "cache.sink": 15},
}
Load = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def load(cheap_run: Callable[..., Path]) -> Load:
    """load(setting): the small Llama, cache quantized and rotated, in float64, loaded once. Not to be changed."""

    @cache
    def load(setting: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
        run = cheap_run("w4a4kv4", {"activations.bits": 16, "cache.sink": 0, **SETTINGS[setting]})
        return rotoboa.load(run, dtype=dtype)[0]

    return load


def ids(*shape: int) -> Tensor:
    return torch.randint(2, 2048, shape, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor, **options: Any) -> Tensor:
    result: Tensor = model(tokens, **options).logits
    return result


def packed(cache: Any) -> bool:
    return len(cache.layers) == 2 and all(type(layer) is PackedLayer for layer in cache.layers)


@pytest.mark.parametrize("setting", SETTINGS)
def test_one_pass_with_the_cache_is_the_simulation(load: Load, setting: str) -> None:
    model, tokens = load(setting), ids(2, 40)
    with torch.no_grad():
        result = model(tokens, use_cache=True)
    assert packed(result.past_key_values) and result.past_key_values.get_seq_length() == 40
    assert torch.equal(result.logits, logits(model, tokens, use_cache=False))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("steps", [[1] * 24, [10, 1, 1, 7, 1, 4], [23, 1]])
def test_token_by_token_is_one_pass(load: Load, setting: str, steps: list[int]) -> None:
    model, tokens = load(setting), ids(2, 24)
    expected, parts, past = logits(model, tokens, use_cache=False), [], None
    for part in tokens.split(steps, 1):
        with torch.no_grad():
            result = model(part, past_key_values=past, use_cache=True)
        past = result.past_key_values
        parts.append(result.logits)
    assert past is not None and packed(past) and past.get_seq_length() == 24
    assert (torch.cat(parts, 1) - expected).abs().max() < 1e-5 * expected.std()


@pytest.mark.parametrize("given", [DynamicCache, lambda config: DynamicCache(config=config)], ids=["bare", "config"])
def test_a_cache_of_the_caller_is_filled(load: Load, given: Callable[..., DynamicCache]) -> None:
    """It is kept by the caller, who does not look at what the model returns."""
    model, tokens = load("kv4"), ids(1, 12)
    mine = given(config=model.config) if given is not DynamicCache else DynamicCache()
    expected = logits(model, tokens, use_cache=False)
    first = logits(model, tokens[:, :8], past_key_values=mine)
    assert packed(mine) and mine.get_seq_length() == 8
    second = logits(model, tokens[:, 8:], past_key_values=mine)
    assert (torch.cat([first, second], 1) - expected).abs().max() < 1e-5 * expected.std()
    mine.crop(-6)
    again = logits(model, tokens[:, 6:], past_key_values=mine)
    assert (again - expected[:, 6:]).abs().max() < 1e-5 * expected.std()


def test_another_cache_is_left_alone_and_rounded_as_it_is_read(load: Load) -> None:
    model, tokens = load("kv4"), ids(1, 10)
    static = StaticCache(model.config, max_cache_len=16)
    found = torch.cat([logits(model, part, past_key_values=static) for part in tokens.split([7, 3], 1)], 1)
    assert not any(isinstance(layer, PackedLayer) for layer in static.layers)
    expected = logits(model, tokens, use_cache=False)
    assert (found - expected).abs().max() < 1e-5 * expected.std()


def test_no_cache_where_none_is_wanted(load: Load) -> None:
    model = load("kv4")
    with torch.no_grad():
        assert model(ids(1, 5), use_cache=False).past_key_values is None
        assert packed(model(ids(1, 5)).past_key_values)


GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True}


def slowly(model: PreTrainedModel, tokens: Tensor, new: int) -> Tensor:
    for _ in range(new):
        tokens = torch.cat([tokens, logits(model, tokens, use_cache=False)[:, -1:].argmax(-1)], 1)
    return tokens


@pytest.mark.parametrize("setting", SETTINGS)
def test_generate_stores_packed_integers(load: Load, setting: str) -> None:
    model, prompt = load(setting), ids(2, 12)
    result = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, **GREEDY)
    assert torch.equal(result.sequences, slowly(model, prompt, 16))
    assert packed(result.past_key_values) and result.past_key_values.get_seq_length() == 12 + 16 - 1
    stored = result.past_key_values.layers[0]
    words = -(-16 * SETTINGS[setting]["cache.key_bits"] // 32)
    kind, width = (torch.uint8, 16) if setting.startswith("fp8") else (torch.int32, words)
    assert stored.keys.dtype == kind and stored.keys.shape == (2, 2, 27, width)


def test_four_bits_an_entry(load: Load) -> None:
    """In bfloat16: 4 bits an entry and 32 a vector, so of 16 entries 6 bits in place of 16."""
    model, prompt = load("kv4", torch.bfloat16), ids(2, 12)
    result = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, **GREEDY)
    entries = 2 * 2 * 2 * 16 * 16 * 2  # keys and values, batch, heads, tokens, head_dim, blocks
    assert cache_bytes(result.past_key_values) == entries * 6 // 8
    stock = DynamicCache()
    for block in range(2):
        stock.update(torch.zeros(2, 2, 16, 16).bfloat16(), torch.zeros(2, 2, 16, 16).bfloat16(), block)
    assert cache_bytes(stock) == entries * 2


def test_beam_search(load: Load) -> None:
    """Beams with the packed cache, reordered at every step, are the beams of no cache."""
    model, prompt = load("kv4"), ids(2, 9)
    options = {**GREEDY, "num_beams": 3, "max_new_tokens": 8, "num_return_sequences": 2, "output_scores": True}
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **options)
    assert torch.equal(found.sequences, plain.sequences)
    torch.testing.assert_close(found.sequences_scores, plain.sequences_scores, rtol=1e-5, atol=1e-5)


def test_left_padding(load: Load) -> None:
    model, prompt = load("kv4"), ids(1, 9)
    alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, **GREEDY).sequences
    padded = torch.cat([torch.nn.functional.pad(prompt, (5, 0)), ids(1, 14)])
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    together = model.generate(padded, attention_mask=mask, max_new_tokens=8, **GREEDY).sequences
    assert torch.equal(together[0, 14:], alone[0, 9:])


def test_drafts_of_prompt_lookup_are_cropped(load: Load) -> None:
    """Assisted decoding removes the tokens that were guessed wrong from the cache."""
    model = load("kv4")
    prompt = ids(1, 6).repeat(1, 3)
    options = {**GREEDY, "max_new_tokens": 10, "attention_mask": torch.ones_like(prompt)}
    assisted = model.generate(prompt, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(assisted.sequences, model.generate(prompt, **options).sequences)


def test_a_prompt_shorter_than_the_sink(load: Load) -> None:
    """Nothing is rounded before the sink is full, and tokens that are taken back leave room in it."""
    model, tokens = load("k4v16, sink of 15"), ids(2, 20)
    expected, mine = logits(model, tokens, use_cache=False), DynamicCache()
    logits(model, tokens[:, :9], past_key_values=mine)
    assert all(layer.keys.shape[2] == 9 and layer.sinks.kept[0].shape[2] == 15 for layer in mine.layers)
    logits(model, tokens[:, 9:17], past_key_values=mine)
    mine.crop(-5)
    assert mine.get_seq_length() == 12
    found = logits(model, tokens[:, 12:], past_key_values=mine)
    assert (found - expected[:, 12:]).abs().max() < 1e-5 * expected.std()


@pytest.fixture
def sliding() -> MistralForCausalLM:
    """Two blocks with a window of 5 and quantizers of 4 bits, in float64, without a packed cache yet."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=5,
        initializer_range=0.5,
        attn_implementation=NAME,
    )
    model = MistralForCausalLM(config).double().eval()
    keys, values = (DynamicQuantizer(4, False, clip) for clip in (0.95, 0.9))
    for block in model.model.layers:
        set_attention(block.self_attn, AttentionTransform(Hadamard.of(8), keys, values))
    return model


@pytest.mark.parametrize("steps", [[7, 1, 1, 4, 1, 6], [1] * 20, [4, 1, 15], [20]])
@pytest.mark.parametrize("kept", [True, False], ids=["every token", "window"])
@pytest.mark.parametrize("sink", [0, 2, 6])
def test_sliding_window(sliding: MistralForCausalLM, kept: bool, steps: list[int], sink: int) -> None:
    """Where the cache is not made from a config every token is kept, and the mask hides those the window has passed."""
    tokens = ids(2, 20) % 64
    for block in sliding.model.layers:
        set_attention(block.self_attn, replace(block.self_attn.rotoboa_transform, sink=sink))
    expected = logits(sliding, tokens, use_cache=False)
    use_packed_cache(sliding.model, "layers", ["self_attn"] * len(sliding.model.layers))
    mine = DynamicCache() if kept else DynamicCache(config=sliding.config)
    found = torch.cat([logits(sliding, part, past_key_values=mine) for part in tokens.split(steps, 1)], 1)
    assert {type(layer) for layer in mine.layers} == {PackedLayer if kept else PackedSlidingLayer}
    sizes = {layer.keys.shape[2] for layer in mine.layers}
    assert mine.get_seq_length() == 20 and sizes == {20 if kept else 4}
    assert (found - expected).abs().max() < 1e-5 * expected.std()


def test_the_window_counts(sliding: MistralForCausalLM) -> None:
    tokens = ids(2, 20) % 64
    expected = logits(sliding, tokens, use_cache=False)
    sliding.config.sliding_window = None
    assert (logits(sliding, tokens, use_cache=False) - expected).abs().max() > 0.01 * expected.std()


def test_tokens_are_taken_back_within_a_window(sliding: MistralForCausalLM) -> None:
    """As assisted decoding does: everything is kept up to the next crop."""
    tokens = ids(1, 20) % 64
    expected = logits(sliding, tokens, use_cache=False)
    use_packed_cache(sliding.model, "layers", ["self_attn"] * len(sliding.model.layers))
    mine = DynamicCache(config=sliding.config)
    mine.activate_past_recording()
    wrong = torch.cat([tokens[:, :12], tokens[:, :3]], 1)
    logits(sliding, wrong, past_key_values=mine)
    mine.crop(-3)
    assert mine.get_seq_length() == 12 and mine.layers[0].keys.shape[2] == 4
    found = torch.cat([logits(sliding, part, past_key_values=mine) for part in tokens[:, 12:].split([1, 5, 2], 1)], 1)
    assert (found - expected[:, 12:]).abs().max() < 1e-5 * expected.std()
    forgetful = DynamicCache(config=sliding.config)
    logits(sliding, tokens, past_key_values=forgetful)
    with pytest.raises(RuntimeError, match="call activate_past_recording before"):
        forgetful.crop(-1)
    forgetful.reset()
    forgetful.crop(-1)  # of nothing
    assert forgetful.get_seq_length() == 0
    assert torch.equal(logits(sliding, tokens, past_key_values=forgetful), expected)


def test_generate_with_a_sliding_window(sliding: MistralForCausalLM) -> None:
    prompt = ids(2, 9) % 64
    expected = slowly(sliding, prompt, 12)
    use_packed_cache(sliding.model, "layers", ["self_attn"] * len(sliding.model.layers))
    options = {**GREEDY, "max_new_tokens": 12, "attention_mask": torch.ones_like(prompt)}
    result = sliding.generate(prompt, **options)
    assert torch.equal(result.sequences, expected)
    assert all(type(layer) is PackedSlidingLayer for layer in result.past_key_values.layers)
    options["attention_mask"] = options["attention_mask"][:1]
    assisted = sliding.generate(prompt[:1], prompt_lookup_num_tokens=3, **options)
    assert torch.equal(assisted.sequences, expected[:1])


def test_a_cache_made_by_hand_is_the_same(load: Load) -> None:
    model = load("k2v3")
    with torch.no_grad():
        cache = model(ids(1, 4)).past_key_values
    made = packed_cache([layer.transform for layer in cache.layers])
    assert packed(made) and torch.equal(logits(model, ids(1, 4), past_key_values=made), logits(model, ids(1, 4)))
