"""Runs with scales that calibration found, of FP8 inputs and of an FP8 cache: their files, and who refuses them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from safetensors.torch import load_file, save_file

from rotoboa.boa.online.float8 import StaticFloat8
from rotoboa.errors import InputError
from rotoboa.export.finished import Finished
from rotoboa.export.formats import compressed_tensors, gguf, gptq, mlx
from rotoboa.export.formats.card import served_cache
from rotoboa.export.formats.compressed_tensors_reader import inspect
from rotoboa.export.spec import Spec
from rotoboa.pipeline.job.job import prepare
from rotoboa.pipeline.verifying import run_logits

CACHE = {"cache.key_bits": 8, "cache.value_bits": 8, "cache.format": "fp8", "weights.symmetric": True}
SERVED = {**CACHE, "cache.served_by": "vllm"}
STATIC = {"rotation.r1": "merged", "activations.dynamic": False}
Opened = Callable[..., Finished]


def test_a_spec_says_it_and_old_ones_are_without() -> None:
    spec = Spec(8, key_bits=8, value_bits=8, cache_format="fp8", activation_dynamic=False)
    assert Spec.from_dict(spec.to_dict()) == spec
    assert not {"cache_format", "activation_dynamic"} & Spec(4).to_dict().keys()
    with pytest.raises(InputError, match="cache_format is 'fp4'"):
        Spec.from_dict({**spec.to_dict(), "cache_format": "fp4"})
    assert spec.unrotated.activation_dynamic  # for the model rounded to nearest nothing is calibrated


def test_the_scales_of_a_cache_go_along(opened_run: Opened, tmp_path: Path) -> None:
    """And what the library of the format makes of them is what the run does."""
    run = opened_run("w4a16", SERVED)
    compressed_tensors.write(run, tmp_path / "export")
    inspect(tmp_path / "export")
    data = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]
    args = QuantizationConfig.model_validate(data).kv_cache_scheme
    assert args is not None and (args.num_bits, args.type, args.strategy, args.dynamic) == (8, "float", "tensor", False)
    (file,) = (tmp_path / "export").glob("*.safetensors")
    tensors, x = load_file(file), 30 * torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    for index in range(2):
        attention = run.spec.transforms(run.shape, run.family).attention.calibrated(
            {name.rpartition(".")[2]: tensor for name, tensor in run.block(index).items()}.get
        )
        for part, quantizer in (("k_scale", attention.key), ("v_scale", attention.value)):
            scale = tensors[f"model.layers.{index}.self_attn.{part}"]
            assert scale.shape == (1,) and scale.dtype == torch.float32 and quantizer != StaticFloat8
            assert isinstance(quantizer, StaticFloat8)
            assert torch.equal(quantizer(x), fake_quantize(x, scale, None, args)) and float(scale) != 1.0
    save_file({n: t for n, t in tensors.items() if not n.endswith("1.self_attn.v_scale")}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"1\.self_attn\.v_scale"):
        inspect(tmp_path / "export")
    said = served_cache(run.spec)
    assert "keeps its cache so, without an option" in said and "16 bits" in said


def test_the_scales_of_inputs_go_along(opened_run: Opened, tmp_path: Path) -> None:
    run = opened_run("fp8", STATIC)
    compressed_tensors.write(run, tmp_path / "export")
    inspect(tmp_path / "export")
    data = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]
    args = QuantizationConfig.model_validate(data).config_groups["group_0"].input_activations
    assert args is not None and (args.strategy, args.dynamic, args.type) == ("tensor", False, "float")
    (file,) = (tmp_path / "export").glob("*.safetensors")
    tensors = load_file(file)
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(".input_scale")}
    assert len(scales) == 14 and {tensor.dtype for tensor in scales.values()} == {torch.float32}
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        stored = run.block(1)[f"{name}.input_scale"]
        assert torch.equal(scales[f"model.layers.1.{name}.input_scale"], stored.float())
    parts = [scales[f"model.layers.0.self_attn.{name}_proj.input_scale"] for name in "qkv"]
    assert len({float(part) for part in parts}) == 1  # vLLM computes them as one layer
    del tensors["model.layers.0.mlp.up_proj.input_scale"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"mlp\.up_proj\.input_scale"):
        inspect(tmp_path / "export")


@torch.no_grad()
def test_what_was_found_matters_and_can_be_left_out(opened_run: Opened) -> None:
    """The run without its quantizers is still read, as a runtime is compared with that."""
    ids = torch.randint(2, 2048, (1, 24), generator=torch.Generator().manual_seed(0))
    for name, changes in (("fp8", STATIC), ("w4a16", SERVED), ("w4a16", {**CACHE, "cache.sink": 1})):
        run = opened_run(name, changes)
        found = run_logits(run, ids)
        plain = run_logits(replace(run, spec=run.spec.without_inputs.without_cache), ids)
        assert 1e-3 < (found - plain).std() < 0.2 * plain.std()


@pytest.mark.parametrize(
    ("writer", "name"), [(gptq, "GPTQ"), (mlx, "MLX"), (gguf, "GGUF")], ids=["gptq", "mlx", "gguf"]
)
def test_other_formats_refuse_a_cache_in_fp8(writer: Any, name: str, opened_run: Opened) -> None:
    with pytest.raises(InputError, match=f"8-bit values in FP8, as vllm keeps it, which {name} cannot hold"):
        writer.check(opened_run("w4a16", SERVED))


def test_a_cache_of_our_own_is_refused_by_compressed_tensors(opened_run: Opened) -> None:
    with pytest.raises(InputError, match=r"8-bit values in FP8, which compressed-tensors cannot hold"):
        compressed_tensors.check(opened_run("w4a16", CACHE))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache.served_by": "llama.cpp"}, "fp8 is not in llama.cpp: give --cache.served_by vllm, or"),
        ({"cache.value_bits": 16}, "fp8 has keys and values in 8 bits, and .* are 8 and 16: give 8 for both"),
        ({"cache.key_bits": 4}, "are 4 and 8: give 8 for both, or --cache.format int"),
    ],
)
def test_what_a_cache_in_fp8_has_not_is_refused(
    make_recipe: Callable[..., Any], llama: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        prepare(make_recipe("w4a16", {"model": str(llama), **CACHE, **changes}))
