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
from rotoboa.pipeline.job.job import prepare
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
    assert found is not None
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


@pytest.mark.parametrize("changes", [{"activations.bits": 8}, {"overrides": "*.down_proj: activations.bits=8"}])
def test_zero_points_are_refused(make_recipe: Callable[..., Any], llama: Path, changes: dict[str, Any]) -> None:
    given = {"model": str(llama), "activations.convention": "vllm", "activations.symmetric": False}
    prepare(make_recipe("w4a16", given))
    with pytest.raises(InputError, match=r"activations\.convention vllm has no zero points: give --activations\.sym"):
        prepare(make_recipe("w4a16", given | changes))


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "stored", "shown"),
    [
        ({}, "int-quantized", ["W8A8"]),
        ({"overrides": "blocks 0: weights.bits=16 activations.bits=16"}, "int-quantized", ["W8A8", "W16A16"]),
        ({"overrides": "*.down_proj: activations.bits=4"}, "pack-quantized", ["W8A8", "W8A4"]),
    ],
    ids=["whole", "a block in 16 bits", "down in W8A4"],
)
def test_stock_transformers_computes_what_the_run_computes(
    opened_run: Opened, tmp_path: Path, changes: dict[str, Any], stored: str, shown: list[str]
) -> None:
    run = opened_run("w8a8", changes)
    compressed_tensors.write(run, tmp_path / "export")
    inspect(tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]
    formats = {config["format"], *(group["format"] for group in config["config_groups"].values())}
    assert formats == {stored}
    ids = torch.randint(2, 2048, (2, 40), generator=torch.Generator().manual_seed(0))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)(ids).logits
    expected = run_logits(run, ids, plain=True)
    assert expected.std() > 0.5 and (found - expected).abs().max() < 1e-4
    without = replace(run, spec=run.spec.without_inputs)
    assert (run_logits(without, ids, plain=True) - expected).abs().max() > 1e-3, "inputs are rounded"


def test_integers_and_scales_are_those_of_the_run(opened_run: Opened, tmp_path: Path) -> None:
    run = opened_run("w8a8")
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
    packed = cheap_run("w8a8", {"weights.bits": 4})
    with caplog.at_level(logging.WARNING, "rotoboa"):
        result = CliRunner().invoke(
            app, ["export", str(packed), "--format", "compressed-tensors", "--output", str(tmp_path / "a")]
        )
    assert result.exit_code == 0, result.output
    assert "vLLM serves this export with inputs in 16 bits" in caplog.text and "recipe w8a8" in caplog.text
    card = (tmp_path / "a" / "README.md").read_text()
    assert "`pack-quantized`" in card and "what it computes is W4A16" in card
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
