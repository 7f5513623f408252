"""Blocks made one at a time compute what the whole model computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from rotoboa.boa.online.attention import NAME
from rotoboa.errors import InputError
from rotoboa.models.aliases import TINY_FOLDER
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.decoder import Decoder

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "llama3": {"rope_parameters": LLAMA3_ROPE},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one key head": {"num_key_value_heads": 1},
    "as many key heads": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 32},
    "tied": {"tie_word_embeddings": True},
}


@torch.no_grad()
def chained(folder: Path, ids: Tensor, attention: str = NAME) -> Tensor:
    checkpoint = Checkpoint(folder)
    decoder = Decoder(checkpoint.config, attention=attention)
    hidden = checkpoint.embedding()[ids].float()
    for index in range(decoder.shape.blocks):
        hidden = decoder.run(decoder.block(index, checkpoint.block(index)), hidden)
    logits: Tensor = decoder.norm(checkpoint.final_norm())(hidden) @ checkpoint.head()[:].float().T
    return logits


@torch.no_grad()
def whole(folder: Path, ids: Tensor) -> Tensor:
    logits: Tensor = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    return logits


def tokens(*shape: int) -> Tensor:
    return torch.randint(2048, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("attention", [NAME, "sdpa"])
def test_chained_blocks_are_the_model(
    save_llama: Callable[..., Path], tmp_path: Path, config: str, attention: str
) -> None:
    folder, ids = save_llama(tmp_path, **CONFIGS[config]), tokens(3, 100)
    expected = whole(folder, ids)
    assert expected.std() > 0.1
    assert (chained(folder, ids, attention) - expected).abs().max() < 1e-5


def test_embedded_model() -> None:
    ids = tokens(2, 200)
    assert (chained(TINY_FOLDER, ids) - whole(TINY_FOLDER, ids)).abs().max() < 1e-4


def test_the_scaling_of_llama3_matters(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    plain = save_llama(tmp_path / "plain", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    scaled = save_llama(tmp_path / "scaled", rope_parameters=LLAMA3_ROPE)
    ids = tokens(1, 100)
    assert (chained(plain, ids) - chained(scaled, ids)).abs().max() > 1e-2


def test_shape_and_dtype(llama: Path) -> None:
    checkpoint = Checkpoint(llama)
    decoder = Decoder(checkpoint.config, dtype=torch.float64)
    s = decoder.shape
    assert (s.blocks, s.hidden, s.ffn, s.query_heads, s.key_heads, s.head_dim, s.vocabulary) == (
        *(2, 64, 96),
        *(4, 2, 16, 2048),
    )
    block = decoder.block(0, checkpoint.block(0))
    assert {p.dtype for p in block.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in block.parameters()) and not block.training
    assert set(decoder.shapes) == set(checkpoint.names)


def test_blocks_share_nothing(llama: Path) -> None:
    checkpoint = Checkpoint(llama)
    decoder = Decoder(checkpoint.config)
    first, second = (decoder.block(0, checkpoint.block(0)) for _ in range(2))
    first.get_parameter("mlp.up_proj.weight").data.zero_()
    assert second.get_parameter("mlp.up_proj.weight").abs().sum() > 0
    assert all(p.is_meta for p in decoder.skeleton.parameters())


def test_tensors_that_contradict_the_config_are_named(llama: Path) -> None:
    checkpoint = Checkpoint(llama)
    decoder = Decoder(checkpoint.config)
    tensors = checkpoint.block(1)
    narrow = tensors | {"mlp.up_proj.weight": torch.zeros(96, 63)}
    with pytest.raises(InputError, match=r"block 1: .*contradicts its config.json.*up_proj"):
        decoder.block(1, narrow)
    missing = {name: tensor for name, tensor in tensors.items() if name != "mlp.up_proj.weight"}
    with pytest.raises(InputError, match=r"Missing key.*up_proj"):
        decoder.block(1, missing)
    with pytest.raises(InputError, match=r"Unexpected key.*surplus"):
        decoder.block(1, tensors | {"surplus": torch.zeros(1)})
