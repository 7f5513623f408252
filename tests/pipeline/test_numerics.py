"""Checkpoints of every dtype, dead channels and Hessians that fail, in whole runs."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rotoboa
from rotoboa.errors import RunError
from rotoboa.export.packing import unpack
from rotoboa.pipeline.recipe.recipe import Recipe

MakeRecipe = Callable[..., Recipe]
SaveLlama = Callable[..., Path]
Change = Callable[..., Path]
OFF = {"rotation.r1": False, "rotation.r2": False, "rotation.r3": False, "rotation.r4": False}


def measured(report: dict[str, Any]) -> dict[str, float]:
    (found,) = report["perplexity"].values()
    return dict(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(save_llama: SaveLlama, make_recipe: MakeRecipe, tmp_path: Path, dtype: torch.dtype) -> None:
    model = save_llama(tmp_path / "model", dtype=dtype)
    changes = {"weights.bits": 8, "activations.bits": 8, "weights.head": 0.5}
    report = rotoboa.quantize(make_recipe("w4a4kv4", {"model": str(model), "output": tmp_path / "run", **changes}))
    assert measured(report)["quantized"] == pytest.approx(measured(report)["full_precision"], rel=0.05)
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    kept = {name: tensor.dtype for name, tensor in exported.items() if name.endswith(".weight")}
    assert len(kept) == 7 and set(kept.values()) == {dtype}  # embedding, head, five norms
    loaded, _ = rotoboa.load(tmp_path / "run")
    assert loaded.dtype == dtype
    with torch.no_grad():
        assert loaded(torch.arange(20)[None]).logits.isfinite().all()


def test_dtypes_mean_the_same(save_llama: SaveLlama, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    # bfloat16 values are float32 values: the same model in another dtype.
    half = save_llama(tmp_path / "bfloat16", dtype=torch.bfloat16)
    wide = save_llama(tmp_path / "float32", dtype=torch.float32)
    tensors = {name: tensor.float() for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(tensors, wide / "model.safetensors", {"format": "pt"})
    for model in (half, wide):
        changes = {"model": str(model), "output": tmp_path / f"run-{model.name}", **OFF}
        rotoboa.quantize(make_recipe("w4a16", changes))
    first, second = (
        load_file(tmp_path / f"run-{name}" / "blocks" / "00000.safetensors") for name in (half.name, wide.name)
    )
    for name, tensor in first.items():
        assert torch.equal(tensor.float(), second[name].float()), name


def test_a_checkpoint_whose_rotation_overflows_its_dtype_is_named(
    save_llama: SaveLlama, change_tensors: Change, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    model = save_llama(tmp_path / "model", dtype=torch.float16)
    name = "model.embed_tokens.weight"
    change_tensors(model, lambda tensors: tensors[name][5:6].fill_(60000.0))  # its norm is larger than any float16
    recipe = make_recipe("w4a16", {"model": str(model), "output": tmp_path / "run"})
    words = rf"tensor {name} does not fit into float16 once rotated: save it as bfloat16 or float32"
    with pytest.raises(RunError, match=words):
        rotoboa.quantize(recipe)


@pytest.mark.parametrize("method", ["rtn", "gptq", "boa"])
def test_dead_channels(
    save_llama: SaveLlama, change_tensors: Change, make_recipe: MakeRecipe, tmp_path: Path, method: str
) -> None:
    """Channels that are never active, in every kind of input, and a head whose keys are all zero."""

    def kill(tensors: dict[str, torch.Tensor]) -> None:
        block = "model.layers.0"
        tensors["model.embed_tokens.weight"][:, 3] = 0
        tensors[f"{block}.self_attn.v_proj.weight"][5] = 0  # read by O in the first two heads
        tensors[f"{block}.mlp.up_proj.weight"][7] = 0  # read by down
        tensors[f"{block}.self_attn.k_proj.weight"][16:] = 0  # all of a key head

    model = change_tensors(save_llama(tmp_path / "model"), kill)
    changes = {"model": str(model), "output": tmp_path / "run", "weights.method": method, **OFF}
    report = rotoboa.quantize(make_recipe("w4a16", changes))
    assert all(math.isfinite(value) for value in measured(report).values())
    if method == "rtn":
        return
    tensors = load_file(tmp_path / "run" / "blocks" / "00000.safetensors")
    for name, width, dead in (("self_attn.q_proj", 64, 3), ("self_attn.o_proj", 64, 5), ("mlp.down_proj", 96, 7)):
        integers = unpack(tensors[f"{name}.qweight"], 4, width)
        zero = tensors[f"{name}.zero"]
        assert torch.equal(integers[:, dead], zero[:, 0]), name  # weight 0
        assert (integers != zero).float().mean() > 0.5


def test_raised_damping_is_in_manifest_and_report(
    save_llama: SaveLlama, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fewer tokens than channels: the Hessians are singular, and this damping is below their rounding errors.
    monkeypatch.setattr("rotoboa.boa.objective.objective.FEW_TOKENS", 0)  # they would be shrunk, and not fail
    model = save_llama(tmp_path / "model")
    small = {"calibration.samples": 1, "calibration.sequence_length": 16, "weights.damping": 1e-13}
    recipe = make_recipe("w4a16", {"model": str(model), "output": tmp_path / "run", "weights.method": "gptq", **small})
    report = rotoboa.quantize(recipe)
    blocks = json.loads((tmp_path / "run" / "manifest.json").read_text())["blocks"]
    raised = report["raised_damping"]
    assert "0.mlp.down_proj" in raised and all(1e-13 < value < 1e-4 for value in raised.values())
    assert raised["0.mlp.down_proj"] == blocks[0]["layers"]["mlp.down_proj"]["damping"]
