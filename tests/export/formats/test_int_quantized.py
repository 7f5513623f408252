"""Inputs with the scales of a reader; W8A8 as `int-quantized`, computed in integers; what is said of other schemes."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.errors import InputError
from rotoboa.export.finished import Finished
from rotoboa.export.formats import compressed_tensors
from rotoboa.export.formats.compressed_tensors_reader import inspect
from rotoboa.export.spec import Spec
from rotoboa.models.families import FAMILIES
from rotoboa.models.shape import Shape
from rotoboa.pipeline.cli.app import app
from rotoboa.pipeline.exporting import export
from rotoboa.pipeline.verifying import run_logits

Runs = Callable[..., Path]
Opened = Callable[..., Finished]
SMALL = Shape(hidden=96, ffn=96, blocks=1, query_heads=2, key_heads=2, head_dim=48, vocabulary=8)


def quantizer(convention: str, bits: int, group: int | None = None) -> DynamicQuantizer:
    """Of the inputs of Q, K and V, as calibration and the native model have it."""
    spec = Spec(
        4, activation_bits=bits, activation_group=group, activation_search=True, activation_convention=convention
    )
    found = spec.transforms(SMALL, FAMILIES["llama"]).qkv.quantizer
    assert isinstance(found, DynamicQuantizer)
    return found


@pytest.fixture(scope="module")
def x() -> Tensor:
    """Tokens of many magnitudes; one of zeros."""
    x = torch.randn(3, 50, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None]
    x[0, 0] = 0
    return x


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_as_compressed_tensors_rounds_to_the_last_bit(x: Tensor, bits: int, group: int | None) -> None:
    strategy = "group" if group else "token"
    arguments = QuantizationArgs(num_bits=bits, symmetric=True, strategy=strategy, group_size=group, dynamic=True)
    module = nn.Linear(96, 1)
    module.quantization_status = QuantizationStatus.FROZEN
    theirs = forward_quantize(module, x, "input", arguments)
    assert torch.equal(quantizer("compressed-tensors", bits, group)(x), theirs)
    assert not torch.equal(quantizer("vllm", bits, group)(x), theirs)


def test_as_vllm_rounds(x: Tensor) -> None:
    """Its kernels of W8A8: a scale of max |x| / 127, and nothing is clipped."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    assert torch.equal(quantizer("vllm", 8)(x), (x / scale).round().clamp(-128, 127) * scale)


def test_a_spec_without_a_convention_is_stored_as_ever() -> None:
    assert "activation_convention" not in Spec(4).to_dict()
    kept = Spec(4, activation_bits=8, activation_convention="vllm")
    assert Spec.from_dict(kept.to_dict()) == kept
    with pytest.raises(InputError, match="activation_convention is 'theirs'"):
        Spec.from_dict({**kept.to_dict(), "activation_convention": "theirs"})


@pytest.mark.parametrize("convention", ["vllm", "compressed-tensors"])
def test_with_zero_points_as_every_reader_rounds(x: Tensor, convention: str) -> None:
    """And as vLLM's kernel of W4A8 on processors does, which is torch's own: a product with the identity shows it."""
    whole = Spec(4, activation_bits=8, activation_symmetric=False, activation_convention=convention)
    ours = whole.transforms(SMALL, FAMILIES["llama"]).qkv.quantizer
    assert ours is not None
    wide = x.double()
    low, high = wide.amin(-1, keepdim=True).clamp_max(0), wide.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / 255).clamp_min(1e-30)
    slow = ((wide / scale).round() + (-low / scale).round()).clamp(0, 255) * scale - (-low / scale).round() * scale
    assert ((ours(x) - slow).abs() <= 1e-6 * wide.abs().amax(-1, keepdim=True)).all()
    rows = x.flatten(0, 1)
    one = torch.full((96, 48), 0x88, dtype=torch.uint8)  # zeros, and ones on the diagonal
    index = torch.arange(96)
    one[index, index // 2] = torch.where(index % 2 == 0, 0x89, 0x98).to(torch.uint8)
    packed = torch.ops.aten._dyn_quant_pack_4bit_weight(one, torch.ones(96, 1), None, 96, 96, 96)
    theirs = torch.ops.aten._dyn_quant_matmul_4bit(rows, packed, 96, 96, 96)
    assert ((ours(rows) - theirs).abs() <= 1e-5 * rows.abs().amax(-1, keepdim=True)).all()


@torch.no_grad()
@pytest.mark.parametrize(
    ("recipe", "changes", "stored"),
    [
        ("w8a8", {}, "int-quantized"),
        ("w8a8", {"overrides": "blocks 0: weights.bits=16 activations.bits=16"}, "int-quantized"),
        ("w8a8", {"overrides": "*.down_proj: activations.bits=4"}, "pack-quantized"),
        ("w4a8-cpu", {"weights.group_size": 32}, "int-quantized"),
        ("w4a8-cpu", {"overrides": "*.down_proj: weights.bits=8"}, "int-quantized"),
        ("w4a8", {"activations.convention": "compressed-tensors"}, "pack-quantized"),
    ],
    ids=["whole", "a block in 16 bits", "down in W8A4", "W4A8 with zero points", "down in W8A8", "W4A8 without"],
)
def test_stock_transformers_computes_what_the_run_computes(
    opened_run: Opened, tmp_path: Path, recipe: str, changes: dict[str, Any], stored: str
) -> None:
    run = opened_run(recipe, changes)
    compressed_tensors.write(run, tmp_path / "export")
    inspect(tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]
    formats = {config["format"], *(group["format"] for group in config["config_groups"].values())}
    assert formats == {stored}
    ids = torch.randint(2, 2048, (2, 40), generator=torch.Generator().manual_seed(0))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)(ids).logits
    expected = run_logits(run, ids, plain=True)
    # It adds zero points before it rounds, and now and then a tie in float32 falls the other way.
    limit = 1e-4 if run.spec.activation_symmetric else 0.2 * float(expected.std())
    assert expected.std() > 0.5 and (found - expected).abs().max() < limit
    without = replace(run, spec=run.spec.without_inputs)
    assert (run_logits(without, ids, plain=True) - expected).abs().max() > 1e-3, "inputs are rounded"


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8-cpu"])
def test_integers_and_scales_are_those_of_the_run(opened_run: Opened, tmp_path: Path, recipe: str) -> None:
    run = opened_run(recipe)
    compressed_tensors.write(run, tmp_path / "export")
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    for name in run.family.projections:
        prefix = f"model.layers.1.{name}"
        assert tensors[f"{prefix}.weight"].dtype == torch.int8 and f"{prefix}.weight_packed" not in tensors
        result = run.split(1)[0][name]
        weight = tensors[f"{prefix}.weight"].double() * tensors[f"{prefix}.weight_scale"].double()
        assert torch.equal(weight, result.dequantize().double())


def test_what_vllm_computes_otherwise_is_said(
    cheap_run: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the export's warning and in its card; of W8A8 there is nothing to warn of."""
    packed = cheap_run("w4a8")
    with caplog.at_level(logging.WARNING, "rotoboa"):
        result = CliRunner().invoke(
            app, ["export", str(packed), "--format", "compressed-tensors", "--output", str(tmp_path / "a")]
        )
    assert result.exit_code == 0, result.output
    said = "vLLM leaves the inputs of this export in 16 bits, silently, unless a GPU serves it with --linear-backend"
    assert said in caplog.text and "inputs of W4A8 in 8 bits" in caplog.text
    card = (tmp_path / "a" / "README.md").read_text()
    assert "`pack-quantized`" in card and said in card and "--dtype float16 --linear-backend humming" in card
    with caplog.at_level(logging.WARNING, "rotoboa"):
        card = (export(cheap_run("w4a8-cpu"), "compressed-tensors", output=tmp_path / "d") / "README.md").read_text()
    assert "its kernels on GPUs do not read it" in caplog.text and "in integers on a processor" in card
    assert "with a zero point and the scale (max - min) / 255" in card and "humming" not in card
    caplog.clear()
    with caplog.at_level(logging.WARNING, "rotoboa"):
        card = (export(cheap_run("w8a8"), "compressed-tensors", output=tmp_path / "b") / "README.md").read_text()
    assert not caplog.records and "`int-quantized`" in card
    assert "in integers of 8 bits, with a token's scale max |x| / 127 where the run has 127.5" in card
    card = (
        export(cheap_run("w8a8", {"activations.convention": "vllm"}), "compressed-tensors", output=tmp_path / "c")
        / "README.md"
    ).read_text()
    assert "max |x| / 127, as the run was calibrated" in card and "differ a little in transformers" in card


def test_a_config_of_another_format_is_refused(opened_run: Opened, tmp_path: Path) -> None:
    compressed_tensors.write(opened_run("w8a8"), tmp_path / "export")
    file = tmp_path / "export" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["format"] = "pack-quantized"
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match="pack-quantized, where int-quantized is read"):
        inspect(file.parent)
