"""What lies beside a model is named, what transformers maps works, and other checkpoints are called what they are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rotoboa.errors import InputError
from rotoboa.models.checkpoint import SINGLE, Checkpoint
from rotoboa.models.decoder import Decoder
from rotoboa.models.families import FAMILIES
from rotoboa.models.names import left_out, renamed
from rotoboa.tests.small_families import FAMILIES as VARIANTS

Save = Callable[..., Path]
Change = Callable[..., Any]
Names = Callable[[str], str]


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    """A copy of the small Llama, to be changed."""
    return Path(shutil.copytree(llama, tmp_path / "copied"))


def rename(folder: Path, change: Names) -> Path:
    tensors = load_file(folder / SINGLE)
    save_file({change(name): tensor.clone() for name, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})
    return folder


def read(folder: Path) -> tuple[Checkpoint, dict[str, torch.Size]]:
    checkpoint = Checkpoint(folder)
    shapes = Decoder(checkpoint.config, attention="eager").shapes
    checkpoint.check(shapes)
    return checkpoint, shapes


def notices(folder: Path) -> list[str]:
    checkpoint, shapes = read(folder)
    return checkpoint.notices(shapes)


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        read(folder)
    message = str(caught.value)
    assert str(folder) in message and message.endswith(".") and "download it again" not in message
    return message


def same_as_transformers(folder: Path) -> None:
    checkpoint, _ = read(folder)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    family = checkpoint.family
    assert torch.equal(checkpoint.embedding()[:], state[f"{family.embedding}.weight"])
    assert torch.equal(checkpoint.head()[:], state[f"{family.head}.weight"])
    assert torch.equal(checkpoint.final_norm(), state[f"{family.final_norm}.weight"])
    for name, tensor in checkpoint.block(1).items():
        if (whole := f"{family.layers}.1.{name}") in state:  # but for layers that are split here
            assert torch.equal(tensor, state[whole])


# -- what is left out -------------------------------------------------------------------------------------------------


def test_a_plain_checkpoint_has_nothing_to_say(llama: Path) -> None:
    assert notices(llama) == []


def test_tensors_beside_the_blocks_are_named(copied: Path, change_tensors: Change) -> None:
    more = {f"mtp.layers.{i}.norm.weight": torch.ones(64) for i in range(3)}
    more |= {"model.mtp_layers.0.up.weight": torch.ones(2, 2), "lm_head.bias": torch.ones(4)}
    change_tensors(copied, lambda tensors: tensors.update(more))
    (found,) = notices(copied)
    assert "Left out: 5 tensors of the checkpoint that 'llama' models have no place for (" in found
    assert "(lm_head.bias, model.mtp_layers.*.up.weight, mtp.layers.*.norm.weight)." in found


def test_many_kinds_of_tensors_are_counted(copied: Path, change_tensors: Change) -> None:
    change_tensors(copied, lambda tensors: tensors.update({f"mtp.{c}": torch.ones(1) for c in "abcde"}))
    assert "5 tensors" in notices(copied)[0] and "(mtp.a, mtp.b, mtp.c and 2 more)" in notices(copied)[0]


def test_frequencies_are_nothing_to_speak_of(copied: Path, change_tensors: Change) -> None:
    names = ["model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    change_tensors(copied, lambda tensors: tensors.update(dict.fromkeys(names[:1], torch.ones(8))))
    assert notices(copied) == []


def test_files_that_are_not_read_are_named(copied: Path) -> None:
    save_file({"mtp.fc": torch.ones(2)}, copied / "mtp.safetensors")
    assert notices(copied) == ["Left out: mtp.safetensors, which transformers does not read either."]


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_no_family_leaves_anything_of_its_own_out(variant: str, save_family: Save, tmp_path: Path) -> None:
    assert notices(save_family(tmp_path, variant)) == []


def test_an_adapter_beside_the_model_is_refused(copied: Path) -> None:
    (copied / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, copied / "adapter_model.safetensors")
    words = "holds an adapter (adapter_config.json) beside the model: merge it first (peft's `merge_and_unload`"
    assert words in refusal(copied)


def test_an_adapter_alone_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is an adapter, without the model that it was made for: merge it first" in refusal(tmp_path)


@pytest.mark.parametrize("part", ["lora_A.default", "base_layer"])
def test_tensors_of_an_adapter(copied: Path, change_tensors: Change, part: str) -> None:
    name = f"model.layers.0.self_attn.q_proj.{part}.weight"
    change_tensors(copied, lambda tensors: tensors.update({name: torch.ones(4, 64)}))
    assert f"tensor {name} is unknown" in refusal(copied) and "is an adapter's: merge it first" in refusal(copied)
    change_tensors(copied, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight"))
    assert f"holds an adapter beside its weights ({name}): merge it first" in refusal(copied)


# -- what transformers maps -------------------------------------------------------------------------------------------


def without(name: str) -> str:
    return name.removeprefix("model.")


def twice(name: str) -> str:
    return f"model.{name}"


@pytest.mark.parametrize("change", [without, twice])
@pytest.mark.parametrize("variant", ["llama", "opt", "gemma3_text", "mixtral", "phi3"])
def test_prefixes_that_transformers_maps(variant: str, change: Names, save_family: Save, tmp_path: Path) -> None:
    same_as_transformers(rename(save_family(tmp_path, variant), change))
    assert notices(tmp_path) == []


def test_names_that_are_right_stay(save_family: Save, tmp_path: Path) -> None:
    for name, family in FAMILIES.items():
        for part in (f"{family.embedding}.weight", f"{family.layers}.0.x", f"{family.head}.weight", "mtp.layers.0.x"):
            assert renamed(part, family) == part, name
    assert left_out(["mtp.x", "lm_head.weight"], set(), FAMILIES["llama"]) == ["mtp.x"]


def test_a_tied_head_that_is_stored_alone(save_llama: Save, change_tensors: Change, tmp_path: Path) -> None:
    folder = save_llama(tmp_path, tie_word_embeddings=True)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    same_as_transformers(folder)
    assert notices(folder) == []


def test_a_tied_head_that_is_stored_too(save_llama: Save, change_tensors: Change, tmp_path: Path) -> None:
    folder = save_llama(tmp_path, tie_word_embeddings=True)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    checkpoint, shapes = read(folder)
    assert checkpoint.config.tie_word_embeddings and checkpoint.notices(shapes) == []


def test_a_head_that_differs_is_not_tied(copied: Path, change_config: Change) -> None:
    change_config(copied, tie_word_embeddings=True)
    same_as_transformers(copied)
    checkpoint, shapes = read(copied)
    assert checkpoint.config.tie_word_embeddings is False
    assert "is stored beside the embedding and differs from it: the two are used as they are" in notices(copied)[0]
    assert not checkpoint.outer_layers().tied and len(checkpoint.notices(shapes)) == 1


# -- what a checkpoint is that has other names ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("base_model.model.", "begin with 'base_model.model.', as PEFT leaves it: save the model inside"),
        ("module.", "begin with 'module.', as DistributedDataParallel leaves it"),
        ("_orig_mod.", "begin with '_orig_mod.', as torch.compile leaves it"),
        ("language_model.", "begin with 'language_model.': save the model inside with `save_pretrained`, or take"),
    ],
)
def test_prefixes_of_wrappers(copied: Path, prefix: str, words: str) -> None:
    assert words in refusal(rename(copied, lambda name: prefix + name))


@pytest.mark.parametrize("tied", [True, False])
def test_another_head(
    save_llama: Save, change_tensors: Change, change_config: Change, tmp_path: Path, tied: bool
) -> None:
    folder = save_llama(tmp_path, tie_word_embeddings=tied)
    change_config(folder, architectures=["LlamaForSequenceClassification"])
    change_tensors(folder, lambda t: (t.pop("lm_head.weight", None), t.update({"score.weight": torch.ones(2, 64)})))
    assert "is a LlamaForSequenceClassification, " in refusal(folder)
    assert "give a model that predicts text (a ...ForCausalLM)." in refusal(folder)


def test_the_model_without_its_head(copied: Path, change_tensors: Change, change_config: Change) -> None:
    change_config(copied, architectures=["LlamaModel"])
    change_tensors(copied, lambda tensors: tensors.pop("lm_head.weight"))
    assert "is a LlamaModel, without the output layer lm_head.weight" in refusal(rename(copied, without))


def test_quantized_weights_without_a_word_in_the_config(copied: Path) -> None:
    folder = rename(copied, lambda name: name.replace("q_proj.weight", "q_proj.qweight"))
    assert "holds quantized weights (model.layers.0.self_attn.q_proj.qweight): give the full-precision" in refusal(
        folder
    )


def test_names_of_another_format(copied: Path) -> None:
    folder = rename(copied, lambda name: f"part.{name[::-1]}")
    assert "has other names of tensors (part." in refusal(folder) and "`save_pretrained`" in refusal(folder)


def test_config_is_not_changed_on_disk(copied: Path, change_config: Change) -> None:
    change_config(copied, tie_word_embeddings=True)
    before = (copied / "config.json").read_bytes()
    read(copied)
    assert (copied / "config.json").read_bytes() == before and json.loads(before)["tie_word_embeddings"]
