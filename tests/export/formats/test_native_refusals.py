"""A native checkpoint that is damaged, contradicts itself or is none is refused in one sentence."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import rotoboa
from rotoboa.errors import InputError
from rotoboa.export.spec import FORMAT_VERSION, Spec


@pytest.fixture
def broken(cheap_run: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a model folder, to be damaged."""
    run = cheap_run("w2a16", {"weights.group_size": 16})
    return Path(shutil.copytree(run / "model", tmp_path / "model"))


KNOWN = {"surplus", *(field.name for field in fields(Spec))}


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        target = config["quantization_config"] if name in KNOWN else config
        target[name] = value
    (folder / "config.json").write_text(json.dumps(config))


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_another_format_version_is_refused(broken: Path) -> None:
    edit_config(broken, format_version=99)
    assert f"format version 99, and this installation reads 1 to {FORMAT_VERSION}" in refusal(broken)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"surplus": 1}, "unknown surplus"),
        ({"bits": 9}, "bits is 9"),
        ({"bits": "two"}, "bits is 'two'"),
        ({"key_bits": 1}, "key_bits is 1"),
        ({"activation_clip": 0}, "activation_clip is 0"),
        ({"group_size": -1}, "group_size is -1"),
        ({"activation_group": 0}, "activation_group is 0"),
        ({"activation_group": "x"}, "activation_group is 'x'"),
        ({"symmetric": "no"}, "symmetric is 'no'"),
        ({"cache_search": 1}, "cache_search is 1"),
        ({"cache_center": None}, "cache_center is None"),
        ({"cache_sink": -1}, "cache_sink is -1"),
        ({"activation_directions": -1}, "activation_directions is -1"),
        ({"cache_sink": True}, "cache_sink is True"),
    ],
)
def test_a_damaged_config_is_refused(broken: Path, changes: dict[str, Any], words: str) -> None:
    edit_config(broken, **changes)
    assert f"is damaged: {words}" in refusal(broken)


def test_a_config_without_bits_is_refused(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    del config["quantization_config"]["bits"]
    (broken / "config.json").write_text(json.dumps(config))
    assert "is damaged: no 'bits'" in refusal(broken)


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"bits": 4}, "qweight"),
        ({"group_size": None}, "scale"),
        ({"group_size": 32}, "scale"),
        ({"group_size": 24}, "scale"),
        ({"intermediate_size": 80}, "mlp"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2"),
        ({"attention_bias": True}, "no tensor model.layers.0.self_attn.q_proj.bias"),
        ({"tie_word_embeddings": True}, "ties embedding and head"),
    ],
)
def test_a_config_that_contradicts_its_tensors_is_refused(broken: Path, changes: dict[str, Any], tensor: str) -> None:
    edit_config(broken, **changes)
    assert tensor in refusal(broken)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.qweight",
        "model.layers.0.self_attn.k_proj.scale",
        "model.layers.0.self_attn.v_proj.zero",
        "model.layers.1.input_layernorm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(broken: Path, change_tensors: Callable[..., Path], name: str) -> None:
    change_tensors(broken, lambda tensors: tensors.pop(name))
    assert f"has no tensor {name}: copy or export it again" in refusal(broken)


def test_a_truncated_file_is_named(broken: Path) -> None:
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "model.safetensors is not a whole safetensors file" in refusal(broken)


def test_load_refuses_what_is_no_finished_model(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no model .*: give the folder of a finished run"):
        rotoboa.load(tmp_path / "absent")
    with pytest.raises(InputError, match="holds no model"):
        rotoboa.load(tmp_path)
    with pytest.raises(InputError, match="holds no rotoboa checkpoint: load it with transformers alone"):
        rotoboa.load(llama)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="holds no model"):
        rotoboa.load(tmp_path)
    for content in ("[]", '{"quantization_config": null}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match="holds no rotoboa checkpoint"):
            rotoboa.load(tmp_path)
