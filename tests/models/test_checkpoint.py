"""Checkpoints are read whole, whatever files they lie in, and damaged ones are one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import rotoboa
from rotoboa.errors import InputError, RunError
from rotoboa.models.checkpoint import INDEX, SINGLE, Checkpoint
from rotoboa.models.decoder import Decoder

Save = Callable[..., Path]
Change = Callable[..., object]


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    """A copy of the small Llama, to be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "copied"))


def refusal(folder: Path) -> str:
    """What is said of a folder that is no sound checkpoint, before any tensor is read."""
    with pytest.raises(InputError) as caught:
        checkpoint = Checkpoint(folder)
        checkpoint.check(Decoder(checkpoint.config).shapes)
    message = str(caught.value)
    assert str(folder) in message and message.endswith(".")
    return message


def same_as_transformers(folder: Path) -> Checkpoint:
    checkpoint = Checkpoint(folder)
    checkpoint.check(Decoder(checkpoint.config).shapes)
    state = LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert torch.equal(checkpoint.embedding()[:], state["model.embed_tokens.weight"])
    assert torch.equal(checkpoint.final_norm(), state["model.norm.weight"])
    assert torch.equal(checkpoint.head()[:], state["lm_head.weight"])
    for index in range(2):
        block, prefix = checkpoint.block(index), f"model.layers.{index}."
        assert {prefix + name for name in block} == {name for name in state if name.startswith(prefix)}
        assert all(torch.equal(tensor, state[prefix + name]) for name, tensor in block.items())
    return checkpoint


def test_single_file(llama: Path) -> None:
    checkpoint = same_as_transformers(llama)
    assert checkpoint.files == [llama / SINGLE] and checkpoint.dtype == torch.bfloat16
    assert checkpoint.bytes == (llama / SINGLE).stat().st_size
    assert "lm_head.weight" in checkpoint and "lm_head.bias" not in checkpoint
    assert len(checkpoint.names) == 3 + 2 * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sharded(save_llama: Save, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_llama(tmp_path, shard="300KB", dtype=dtype)
    assert (folder / INDEX).is_file() and not (folder / SINGLE).exists()
    checkpoint = same_as_transformers(folder)
    assert len(checkpoint.files) > 1 and checkpoint.dtype == dtype
    assert checkpoint.bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_a_single_file_goes_before_an_index_as_in_transformers(copied: Path) -> None:
    (copied / INDEX).write_text('{"weight_map": {"a": "absent.safetensors"}}')
    same_as_transformers(copied)


def test_biases(save_llama: Save, tmp_path: Path) -> None:
    checkpoint = same_as_transformers(save_llama(tmp_path, attention_bias=True, mlp_bias=True))
    assert checkpoint.block(1)["mlp.down_proj.bias"].abs().sum() > 0


def test_files_of_another_name(copied: Path) -> None:
    (copied / SINGLE).rename(copied / "weights.safetensors")
    assert torch.equal(
        Checkpoint(copied).embedding()[:], load_file(copied / "weights.safetensors")["model.embed_tokens.weight"]
    )


def test_frequencies_stored_by_old_checkpoints_are_left_out(copied: Path, change_tensors: Change) -> None:
    # Llama 1 and 2 on the hub have them in every block.
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    change_tensors(copied, lambda tensors: tensors.update({name: torch.ones(8)}))
    checkpoint = same_as_transformers(copied)
    Decoder(checkpoint.config).block(1, checkpoint.block(1))


def test_tied_head_is_the_embedding(save_llama: Save, tmp_path: Path) -> None:
    checkpoint = same_as_transformers(save_llama(tmp_path, tie_word_embeddings=True))
    assert "lm_head.weight" not in checkpoint
    assert torch.equal(checkpoint.head()[:], checkpoint.embedding()[:])


def test_a_run_unties_the_head(save_llama: Save, make_recipe: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "tied", tie_word_embeddings=True)
    rotoboa.quantize(make_recipe("w4a16", {"model": str(folder), "output": tmp_path / "run", "weights.bits": 8}))
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    tensors = load_file(tmp_path / "run" / "model" / SINGLE)
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    assert embedding.shape == head.shape and not torch.equal(embedding, head)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        found = rotoboa.load(tmp_path / "run", dtype=torch.float32)[0](ids).logits
        expected = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    assert (found - expected).norm() < 0.05 * expected.norm()


# -- what is no checkpoint --------------------------------------------------------------------------------------------


def test_no_safetensors(copied: Path) -> None:
    (copied / SINGLE).unlink()
    assert "has no safetensors file: save it again with `save_pretrained`" in refusal(copied)
    (copied / "pytorch_model.bin").write_bytes(b"pickle")
    assert "has no safetensors file (it has pytorch_model.bin, and pickle files are never opened)" in refusal(copied)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_truncated_file(copied: Path, kept: int) -> None:
    content = (copied / SINGLE).read_bytes()
    (copied / SINGLE).write_bytes(content[:kept])
    assert f"{SINGLE} is not a whole safetensors file" in refusal(copied)


def test_truncated_shard(save_llama: Save, tmp_path: Path) -> None:
    folder = save_llama(tmp_path, shard="300KB")
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-7])
    assert f"{shard.name} is not a whole safetensors file" in refusal(folder)


def test_missing_shard(save_llama: Save, tmp_path: Path) -> None:
    folder = save_llama(tmp_path, shard="300KB")
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.unlink()
    assert f"lacks the shard {shard.name} that its index names" in refusal(folder)


def test_index_that_names_the_wrong_shard(save_llama: Save, tmp_path: Path) -> None:
    folder = save_llama(tmp_path, shard="300KB")
    index = json.loads((folder / INDEX).read_text())
    name, shards = "model.norm.weight", sorted(set(index["weight_map"].values()))
    index["weight_map"][name] = next(shard for shard in shards if shard != index["weight_map"][name])
    (folder / INDEX).write_text(json.dumps(index))
    assert f"has no tensor {name}, which the index says it has" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_damaged_index(copied: Path, content: str) -> None:
    (copied / SINGLE).rename(copied / "model-00001-of-00001.safetensors")
    (copied / INDEX).write_text(content)
    assert f"{INDEX} is not a valid index" in refusal(copied)


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.v_proj.weight"],
)
def test_missing_tensor(copied: Path, change_tensors: Change, name: str) -> None:
    change_tensors(copied, lambda tensors: tensors.pop(name))
    assert f"has no tensor {name}, which its config.json asks for: download it again" in refusal(copied)
    with pytest.raises(InputError, match=f"has no tensor {name}"):
        Checkpoint(copied).tensor(name)


def test_unknown_tensor_of_a_block(copied: Path, change_tensors: Change) -> None:
    name = "model.layers.0.self_attn.q_norm.weight"
    change_tensors(copied, lambda tensors: tensors.update({name: torch.ones(16)}))
    assert f"tensor {name} is unknown to the 'llama' architecture" in refusal(copied)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"intermediate_size": 128}, "mlp.down_proj.weight has shape (64, 96), and config.json asks for (64, 128)"),
        ({"vocab_size": 2049}, "has shape (2048, 64), and config.json asks for (2049, 64)"),
        ({"num_key_value_heads": 4}, "_proj.weight has shape (32, 64), and config.json asks for (64, 64)"),
        ({"num_hidden_layers": 3}, "has no tensor model.layers.2."),
        ({"num_hidden_layers": 1}, "holds block 1, and num_hidden_layers of its config.json is 1: they do not belong"),
    ],
)
def test_config_of_other_sizes(copied: Path, change_config: Change, changes: dict[str, Any], words: str) -> None:
    change_config(copied, **changes)
    assert words in refusal(copied)


def test_integers_are_no_full_precision(copied: Path, change_tensors: Change) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(copied, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert f"tensor {name} is stored as I8: give the full-precision checkpoint" in refusal(copied)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_nan_and_inf_are_named(copied: Path, change_tensors: Change, name: str, value: float) -> None:
    change_tensors(copied, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
    checkpoint = Checkpoint(copied)
    with pytest.raises(RunError, match=f"model.safetensors: tensor {name} holds NaN or Inf"):
        checkpoint.tensor(name)


def test_missing_config(copied: Path, tmp_path: Path) -> None:
    (copied / "config.json").unlink()
    assert "has no config.json: give the folder of a Hugging Face checkpoint" in refusal(copied)
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(tmp_path / "empty")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "",
        '{"model_type": "llama", "hidden_size": "many"}',
    ],
)
def test_damaged_config(copied: Path, content: str) -> None:
    (copied / "config.json").write_text(content)
    assert "config.json cannot be read (" in refusal(copied)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "unheard"}},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
    ],
)
def test_config_of_no_model(copied: Path, change_config: Change, changes: dict[str, Any]) -> None:
    change_config(copied, **changes)
    with pytest.raises(InputError, match=r"config\.json.*: download it again\.$"):
        Decoder(Checkpoint(copied).config)


@pytest.mark.parametrize(("change", "kind"), [({"model_type": "bert"}, "bert"), ({"model_type": None}, "None")])
def test_unsupported_architecture(copied: Path, change_config: Change, change: dict[str, Any], kind: str) -> None:
    change_config(copied, **change)
    assert f"is a '{kind}' model, which is not supported; supported architectures: bloom, " in refusal(copied)


def test_quantized_already(copied: Path, change_config: Change) -> None:
    change_config(copied, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "is quantized already: give the full-precision checkpoint" in refusal(copied)
