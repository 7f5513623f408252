"""What is refused by name before any work, names on disk, dtypes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from rotoboa.boa.online.attention import NAME
from rotoboa.errors import InputError
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.decoder import Decoder
from rotoboa.models.families import FAMILIES, family_for
from rotoboa.models.generic.generic_decoder import decoder_for
from rotoboa.models.outer_layers import OuterLayers
from rotoboa.models.shape import Shape
from rotoboa.tests.small_families import family_config


def _config(model_type: str, **fields: Any) -> Any:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 100}
    return AutoConfig.for_model(model_type, **(sizes | fields))


@pytest.mark.parametrize(
    ("model_type", "fields", "words"),
    [
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim 16 .* with hidden_size \\(32\\) alone"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before False .* with True alone"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm True"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine False"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm True"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
    ],
)
def test_variants_are_refused(model_type: str, fields: dict[str, Any], words: str) -> None:
    config = _config(model_type, **fields)
    for refuse in (lambda: family_for(config, "it"), lambda: Decoder(config)):
        with pytest.raises(InputError, match=rf"has {words}"):
            refuse()


@pytest.mark.parametrize("name", ["phi", "stablelm"])
def test_a_variant_without_a_row_is_taken_layer_by_layer(family_model: Callable[..., Any], name: str) -> None:
    model = family_model(name, qk_layernorm=True)
    assert family_for(model.config, "it").generic and not family_for(family_model(name).config, "it").generic
    decoder, state = decoder_for(model.config), model.state_dict()
    ids = torch.randint(3, 100, (2, 12))
    outer = OuterLayers.of(decoder.family, state)
    hidden = decoder.embed(outer, ids)
    for i in range(decoder.shape.blocks):
        prefix = f"{decoder.family.layers}.{i}."
        block = decoder.block(i, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        hidden = decoder.run(block, hidden)
    with torch.no_grad():
        torch.testing.assert_close(decoder.logits(outer)(hidden), model(ids).logits)


def test_a_variant_is_refused_as_the_folder_is_opened(save_family: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_family(tmp_path, "opt")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_layer_norm_before": False}))
    with pytest.raises(InputError, match=r"has do_layer_norm_before False in its config.json, and 'opt' models"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["phi3", "mixtral", "qwen3_moe", "qwen2_moe", "opt", "gemma3_text"])
def test_names_on_disk(save_family: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """The names are those of the hub's checkpoints, every tensor is asked for, and each block has what it needs."""
    folder = save_family(tmp_path, name)
    checkpoint = Checkpoint(folder)
    decoder = Decoder(checkpoint.config, attention=NAME)
    checkpoint.check(decoder.shapes)
    tied = {"lm_head.weight"} if checkpoint.config.tie_word_embeddings else set()
    assert set(decoder.shapes) - tied == set(checkpoint.names) - tied
    with safe_open(folder / "model.safetensors", framework="pt") as reader:
        stored = set(reader.keys())
    typical = {
        "phi3": "model.layers.0.self_attn.qkv_proj.weight",
        "mixtral": "model.layers.0.block_sparse_moe.experts.3.w2.weight",
        "qwen3_moe": "model.layers.0.mlp.experts.3.down_proj.weight",
        "qwen2_moe": "model.layers.1.mlp.shared_expert_gate.weight",
        "opt": "model.decoder.layers.0.fc2.bias",
        "gemma3_text": "model.layers.0.pre_feedforward_layernorm.weight",
    }
    assert typical[name] in stored
    for index in range(decoder.shape.blocks):
        block = decoder.block(index, checkpoint.block(index))
        for projection in decoder.family.at(index).projections:
            assert isinstance(block.get_submodule(projection), torch.nn.Linear)


def test_an_expert_that_is_missing_is_named(save_family: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_family(tmp_path, "mixtral"))
    decoder = Decoder(checkpoint.config, attention=NAME)
    checkpoint._stored.pop("model.layers.1.mlp.experts.2.up_proj.weight")
    with pytest.raises(InputError, match=r"has no tensor model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight"):
        checkpoint.check(decoder.shapes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["opt", "mixtral", "gemma2"])
def test_dtypes(save_family: Callable[..., Path], tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint(save_family(tmp_path, name, dtype))
    assert checkpoint.dtype == dtype
    assert {tensor.dtype for tensor in checkpoint.block(0).values()} == {dtype}
    decoder = Decoder(checkpoint.config, attention=NAME)
    assert decoder.embed(checkpoint.outer_layers(), torch.zeros(1, 4, dtype=torch.int64)).dtype == torch.float32


def test_sizes_and_windows() -> None:
    moe = _config("qwen3_moe", moe_intermediate_size=24, num_experts=6, head_dim=16, num_hidden_layers=3)
    shape = Shape.of(moe)
    assert (shape.ffn, shape.experts, shape.head_dim, shape.query_width, shape.key_width) == (24, 6, 16, 64, 64)
    assert family_for(moe, "it").expert_count == 6 and len(family_for(moe, "it").projections) == 4 + 3 * 6
    assert Shape.of(_config("opt", ffn_dim=48, word_embed_proj_dim=32)).ffn == 48
    gemma = _config("gemma2", num_hidden_layers=3, sliding_window=5, head_dim=16)
    decoder = Decoder(gemma, attention=NAME)
    assert [decoder.window(i) for i in range(3)] == [5, None, 5]
    assert decoder.arguments(decoder.empty_block(0), 5)["attention_mask"] is None
    mask = decoder.arguments(decoder.empty_block(0), 9)["attention_mask"][0, 0]
    assert all(mask[i, j] == (j <= i < j + 5) for i in range(9) for j in range(9))
    assert Decoder(_config("llama", sliding_window=5)).window(0) is None, (
        "Llama has no window, whatever its config says"
    )


def test_blocks_are_of_their_kind() -> None:
    family = family_for(family_config("lfm2"), "it")
    assert [family.at(i).mixed for i in range(2)] == [("conv.in_proj",), ()]
    assert family.at(1).query and not family.at(0).query and len(family.all_kinds) == 2
    assert family.at(0).at(1) is family.at(0)


def test_every_row_names_modules_of_its_class() -> None:
    for model_type, row in FAMILIES.items():
        decoder = Decoder(family_config(model_type), attention=NAME)
        for index in range(decoder.shape.blocks):
            block, own = decoder.empty_block(index), decoder.family.at(index)
            for name in (*own.projections, own.attention_norm, own.mlp_norm, own.attention):
                block.get_submodule(name)
            norms = (own.attention_post_norm, own.mlp_post_norm, own.query_norm, own.key_norm)
            for part in filter(None, (*norms, *own.deciders, own.experts)):
                block.get_submodule(part)
        for part in filter(None, (row.embedding, row.final_norm, row.head, row.positions, row.rotary)):
            decoder.skeleton.get_submodule(part)


def test_blocks_that_predict_further_tokens_are_left_out(save_family: Callable[..., Path], tmp_path: Path) -> None:
    """GLM's checkpoints have one behind the last; what chooses experts is read as it is stored."""
    folder = save_family(tmp_path, "glm4_moe")
    tensors = load_file(folder / "model.safetensors")
    more = {"model.layers.2.eh_proj.weight": torch.ones(2, 2), "model.layers.2.mlp.gate.weight": torch.ones(2, 2)}
    save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(folder)
    decoder = Decoder(checkpoint.config, attention=NAME)
    checkpoint.check(decoder.shapes)
    (notice,) = checkpoint.notices(decoder.shapes)
    assert notice.startswith("Left out: 2 tensors") and "model.layers.*.eh_proj.weight" in notice
    assert "mlp.gate.e_score_correction_bias" in checkpoint.block(1)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_nextn_predict_layers": 0}))
    with pytest.raises(InputError, match="holds block 2, and num_hidden_layers"):
        Checkpoint(folder).check(decoder.shapes)
