"""The memory of a report against sizes counted by hand; tests of whole runs hold it against a loaded model."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rotoboa.boa.online.attention import NAME
from rotoboa.export.runtime.memory import memory, model_bytes
from rotoboa.export.spec import Spec
from rotoboa.models.decoder import Decoder

HIDDEN, FFN, HEADS, KEY_HEADS, HEAD_DIM, BLOCKS, VOCABULARY = 64, 96, 4, 2, 16, 3, 128


def config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        **changes,
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("bits", "group", "dtype"), [(4, None, torch.bfloat16), (2, 32, torch.float32)])
def test_model(bits: int, group: int | None, dtype: torch.dtype, tied: bool) -> None:
    decoder = Decoder(config(tie_word_embeddings=tied), attention=NAME)
    found, one = (memory(decoder, Spec(bits, group), dtype, 8, tied=stays)["model"] for stays in (False, tied))
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
    weights = sum(outputs * inputs for outputs, inputs in shapes) * BLOCKS
    scales = sum(outputs * (inputs // (group or inputs)) for outputs, inputs in shapes) * BLOCKS
    norms, outer = HIDDEN * (2 * BLOCKS + 1), VOCABULARY * HIDDEN
    frequencies = 2 * 4 * HEAD_DIM // 2  # RoPE's, which transformers keeps twice, in float32
    assert found["bfloat16"] == 2 * (weights + norms + outer * (1 if tied else 2)) + frequencies
    packed = weights * bits // 8 + 3 * scales
    assert found["quantized"] == packed + dtype.itemsize * (norms + 2 * outer) + frequencies
    assert one["quantized"] == found["quantized"] - (dtype.itemsize * outer if tied else 0)


@pytest.mark.parametrize(("key_bits", "value_bits"), [(4, 4), (2, 3), (8, 16), (16, 16)])
def test_cache(key_bits: int, value_bits: int) -> None:
    spec = Spec(4, r3=True, key_bits=key_bits, value_bits=value_bits)
    found = memory(Decoder(config(), attention=NAME), spec, torch.bfloat16, 10)["cache"]
    vectors = 10 * KEY_HEADS * BLOCKS
    size = {2: 4 + 4, 3: 8 + 4, 4: 8 + 4, 8: 16 + 4, 16: 32}  # whole words; smallest and largest entry
    assert found == {
        "tokens": 10,
        "bfloat16": vectors * 2 * HEAD_DIM * 2,
        "quantized": vectors * (size[key_bits] + size[value_bits]),
    }


def test_cache_with_a_sink() -> None:
    spec = Spec(4, r3=True, key_bits=4, value_bits=16, cache_sink=3)
    found = memory(Decoder(config(), attention=NAME), spec, torch.bfloat16, 10)["cache"]
    assert found["quantized"] == KEY_HEADS * BLOCKS * (3 * 32 + 10 * (8 + 4) + 10 * 32)


def test_model_bytes_count_what_is_tied_once() -> None:
    untied, tied = (LlamaForCausalLM(config(tie_word_embeddings=tied)) for tied in (False, True))
    assert model_bytes(untied) - model_bytes(tied) == 4 * VOCABULARY * HIDDEN
