"""Four-bit floating point: codes and files against compressed-tensors, the native loader, formats without it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from transformers import AutoModelForCausalLM

from rotoboa.boa.kernels.levels import VALUES
from rotoboa.boa.scheme import FLOATS, GROUPS, QuantizationArgs
from rotoboa.boa.solver.rounding import quantize
from rotoboa.boa.solver.rounding_settings import Settings
from rotoboa.errors import InputError
from rotoboa.export.finished import Finished
from rotoboa.export.formats import compressed_tensors, gguf, gptq, mlx
from rotoboa.export.formats.compressed_floats import FORMATS, compress_floats, float_args, float_shapes
from rotoboa.export.formats.compressed_tensors_reader import inspect
from rotoboa.export.packing import from_codes, packed_bytes, packed_parts, to_codes, unpacked
from rotoboa.export.runtime.linear import QuantizedLinear
from rotoboa.pipeline import exporting
from rotoboa.pipeline.verifying import run_logits, verify

Opened = Callable[..., Finished]
EACH = pytest.mark.parametrize("name", list(FLOATS))
FOUR_BITS = pytest.mark.parametrize("name", list(GROUPS))


def _rounded(name: str, rows: int = 12, groups: int = 3) -> tuple[Any, QuantizationArgs]:
    args = QuantizationArgs.of(name, 4, None, False)
    weight = torch.randn(1, rows, groups * GROUPS.get(name, 16), generator=torch.Generator().manual_seed(0))
    found = quantize(weight, None, Settings(bits=4, method="rtn").of(args, 512.0))
    for part in ("integers", "scale", "zero"):
        setattr(found, part, getattr(found, part)[0])
    found.global_scale = 512.0 if name == "nvfp4" else 1.0
    return found, args


def test_codes_are_those_of_e2m1() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    means = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert torch.equal((from_codes(codes).float() - 12) / 2, torch.cat([means, -means]))
    integers = torch.tensor(VALUES, dtype=torch.uint8)
    assert torch.equal(from_codes(to_codes(integers)), integers) and 8 not in to_codes(integers)


@EACH
def test_files_are_those_of_compressed_tensors(name: str) -> None:
    result, args = _rounded(name)
    stock = QuantizationScheme(targets=["Linear"], weights=float_args(args))
    compressor = BaseCompressor.get_value_from_registry(FORMATS[name].value)
    own = compress_floats(result, args)
    columns = result.integers.shape[1]
    assert {part: tuple(tensor.shape) for part, tensor in own.items()} == float_shapes(float_args(args), 12, columns)
    weight, stored = result.dequantize() + 0.0, "weight" if name == "fp8" else "weight_packed"
    state = {"weight": weight, "weight_scale": own["weight_scale"].float()}
    if name == "nvfp4":
        state["weight_global_scale"] = own["weight_global_scale"]
    elif name == "mxfp4":
        state["weight_scale"] = 2 * result.scale
    expected = compressor.compress(state, stock)
    assert torch.equal(own[stored].view(torch.uint8), expected[stored].view(torch.uint8))
    if name != "fp8":  # whose scales are any
        assert torch.equal(own["weight_scale"].view(torch.uint8), expected["weight_scale"].view(torch.uint8))
    assert torch.equal(compressor.decompress(own, stock)["weight"].float(), weight)


@EACH
def test_a_packed_weight_is_read_back_and_computes(name: str) -> None:
    result, args = _rounded(name)
    parts = packed_parts(result, args)
    again = unpacked(parts, args, result.integers.shape[1])
    assert torch.equal(again.dequantize(), result.dequantize()) and again.global_scale == result.global_scale
    stored = sum(tensor.numel() * tensor.element_size() for tensor in parts.values())
    assert stored == packed_bytes(12, result.integers.shape[1], args, 2)
    layer = QuantizedLinear.in_place_of(torch.nn.Linear(result.integers.shape[1], 12, bias=False), args)
    layer.load_state_dict(parts)
    layer = layer.to(torch.bfloat16)
    assert layer.scale.dtype == parts["scale"].dtype
    assert torch.equal(layer.dequantize(torch.float32), result.dequantize())
    x = torch.randn(5, result.integers.shape[1], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ result.dequantize().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ["nvfp4a16", "mxfp4a16", "nvfp4", "mxfp4", "fp8"])
def test_transformers_loads_the_run_itself(recipe: str, cheap_run: Callable[..., Path], opened_run: Opened) -> None:
    ids = torch.randint(2, 2048, (1, 24), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(cheap_run(recipe) / "model", dtype=torch.float32)
    with torch.no_grad():
        found = model(ids).logits
    expected = run_logits(opened_run(recipe), ids)
    assert (found - expected).abs().max() < 1e-3 < 0.5 < expected.std()


@EACH
def test_stock_transformers_emulates_the_run_with_quantized_inputs(
    name: str, opened_run: Opened, tmp_path: Path
) -> None:
    """It unpacks weights to bfloat16, in which they are exact; then it computes in float32, as the run does."""
    recipe = "fp8" if name == "fp8" else f"{name}a16"
    run = opened_run(recipe, {"rotation.r1": "merged", "activations.bits": FLOATS[name][0], "activations.format": name})
    compressed_tensors.write(run, tmp_path / "export")
    inspect(tmp_path / "export")
    ids = torch.randint(2, 2048, (2, 40), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.bfloat16)
    layer = model.model.layers[1].mlp.down_proj
    if name == "nvfp4":
        stored = run.block(1)["mlp.down_proj.input_global_scale"]
        assert torch.equal(layer.input_global_scale.float(), stored.float()) and float(stored) not in (1.0, 4.0)
    with torch.no_grad():
        model(ids)  # which unpacks the weights
        found = torch.nn.Module.float(model)(ids).logits
    expected = run_logits(run, ids, plain=True)
    assert (found - expected).abs().max() < 1e-4 < 0.5 < expected.std()


@pytest.mark.usefixtures("runtimes_here")
@pytest.mark.parametrize(("bits", "unpacked_at_once"), [(8, False), (16, True)])
def test_eight_bits_go_to_stock_transformers(
    cheap_run: Callable[..., Path], tmp_path: Path, bits: int, unpacked_at_once: bool
) -> None:
    run = cheap_run("fp8", {"rotation.r1": "merged", "activations.bits": bits})
    export = exporting.export(run, "compressed-tensors", output=tmp_path / "export")
    config = json.loads((export / "config.json").read_text())["quantization_config"]
    assert config["format"] == "float-quantized" and config.get("dequantize", False) is unpacked_at_once
    (result,) = verify(export)
    assert result.difference < 1e-3 < 0.5 < result.deviation


@FOUR_BITS
@pytest.mark.usefixtures("runtimes_here")
def test_online_blocks_go_along(name: str, cheap_run: Callable[..., Path], tmp_path: Path) -> None:
    """As vLLM has them; seen in the stock model, where the library of the format puts them in."""
    run = cheap_run(name)
    export = exporting.export(run, "compressed-tensors", output=tmp_path / "export")
    with pytest.raises(Exception, match="rotated online: for vLLM alone, not transformers"):
        AutoModelForCausalLM.from_pretrained(export)
    config = json.loads((export / "config.json").read_text())["quantization_config"]["transform_config"]
    assert {group: scheme["head_dim"] for group, scheme in config["config_groups"].items()} == dict.fromkeys(
        ("R1", "R4"), GROUPS[name]
    )
    (result,) = verify(export)
    assert result.difference < 1e-3 < 0.5 < result.deviation
    assert result.reader == "transformers, rotations by compressed-tensors"


@pytest.mark.parametrize("writer", [gptq, mlx, gguf])
def test_formats_of_integers_say_so(writer: Any, opened_run: Opened) -> None:
    with pytest.raises(InputError, match="not written with weights in nvfp4, which this run has: use --format compr"):
        writer.check(opened_run("nvfp4a16"))
