"""What vLLM's own classes make of an export on a GPU, asked on a processor. Knows nothing of rotoboa.

    .venv-vllm/bin/python -I benchmarks/vllm_contract.py EXPORT [EXPORT ...]

Needs vLLM, and for its Humming kernels `humming-kernels` (without dependencies), `cuda-bindings` and `tabulate`. The
platform is made to say CUDA of several compute capabilities. vLLM then reads the export's config, finds the scheme of
each kind of layer, makes room for its tensors, which are held against those of the files, chooses a kernel, and, where
it is Humming's, says what inputs it would round to. No kernel runs: this shows what would be computed, not that it is.
Prints JSON, a line an export.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open

CAPABILITIES = ((8, 0), (8, 9), (9, 0))
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LAYERS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
PREFIX = "model.layers.0."


class Linear(torch.nn.Module):
    """Stands for a linear layer of vLLM: its class is matched by name."""

    logical_widths: list[int]


def shapes(folder: Path) -> dict[str, list[int]]:
    """Of all tensors of the export's first block, by their names."""
    found: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as tensors:
            found |= {k: tensors.get_slice(k).get_shape() for k in tensors.keys() if k.startswith(PREFIX)}  # noqa: SIM118
    return found


def parts_of(layer: str) -> list[str]:
    """The names in a checkpoint of what vLLM computes as one layer."""
    room, _, name = layer.rpartition(".")
    return [f"{PREFIX}{room}.{part}" for part in FUSED.get(name, [name])]


def wrong_tensors(layer: torch.nn.Module, parts: list[str], found: dict[str, list[int]]) -> list[str]:
    """Tensors of the files that the scheme has no room of their size for, and the other way round."""
    wrong = []
    wanted = {name: list(parameter.shape) for name, parameter in layer.named_parameters()}
    if wanted.get("weight") == wanted.get("weight_packed"):
        wanted.pop("weight_packed", None)  # one tensor by two names
    for name, size in wanted.items():
        each = [found[key] for part in parts if (key := f"{part}.{name}") in found]
        if len(each) < len(parts):
            wrong.append(f"no {name}")
            continue
        whole = each[0] if name == "weight_shape" else [sum(shape[0] for shape in each), *each[0][1:]]
        if whole != size:
            wrong.append(f"{name}: {whole} in the files, room for {size}")
    known = {f"{part}.{name}" for part in parts for name in [*wanted, "weight_shape"]}
    extra = sorted(n for n in found if n.rsplit(".", 1)[0] in parts and n not in known)
    return wrong + [f"no room for {name}" for name in extra]


def humming_inputs(scheme: Any, capability: tuple[int, int]) -> str:
    """What Humming's kernel rounds inputs to, as vLLM asks it."""
    from humming import schema as humming_schema  # noqa: F401  (its import says what is missing)
    from vllm.model_executor.layers.quantization.utils.humming.schema import check_and_fallback_input_schema
    from vllm.utils.humming import BaseInputSchema, BaseWeightSchema, HummingInputSchema

    group = 0 if scheme.group_size == -1 else scheme.group_size
    bits = getattr(scheme, "num_bits", 4)
    weight = BaseWeightSchema.from_config(
        {"quant_method": "humming", "dtype": f"int{bits}", "group_size": group, "has_zero_point": False}
    )
    asked = scheme._build_input_quant_config() if hasattr(scheme, "_build_input_quant_config") else None
    given = BaseInputSchema.from_config(asked) if asked else HummingInputSchema()
    sm = capability[0] * 10 + capability[1]
    with patch("humming.schema.humming.current_device") as device:
        device.sm_version = sm
        used = check_and_fallback_input_schema(weight, given, torch.float16, True)
    return "16 bits" if used.a_dtype is None or used.a_dtype.num_bits == 16 else str(used.a_dtype)


def judged(folder: Path) -> list[dict[str, Any]]:
    """A row for each kind of layer, compute capability and choice of backend."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability, PlatformEnum

    kind, config = type(current_platform), json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found, rows = shapes(folder), []
    for capability in CAPABILITIES:
        sm = capability[0] * 10 + capability[1]

        def same(cls: Any, other: Any, device_id: int = 0, *, sm: int = sm) -> bool:
            return sm == (other if isinstance(other, int) else other[0] * 10 + other[1])

        def says(cls: Any, device_id: int = 0, *, capability: Any = capability) -> Any:
            return DeviceCapability(*capability)

        for backend in ("auto", "humming"):
            whole = VllmConfig()
            whole.kernel_config.linear_backend = backend
            whole.model_config = SimpleNamespace(dtype=torch.bfloat16, is_nvfp4_quantized=lambda: False)  # asked by FP8
            with (
                patch.object(kind, "_enum", PlatformEnum.CUDA),
                patch.object(kind, "get_device_capability", classmethod(says)),
                patch.object(kind, "is_device_capability", classmethod(same)),
                patch("vllm._custom_ops.cutlass_scaled_mm_supports_fp8", lambda capability: capability >= 89),
                patch("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda: 0),
                patch("vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: 1),
                set_current_vllm_config(whole),
            ):
                read = CompressedTensorsConfig.from_config(json.loads(json.dumps(config["quantization_config"])))
                read.packed_modules_mapping = FUSED
                rows += [{"sm": sm, "backend": backend, **_row(read, name, found, capability)} for name in LAYERS]
    return [*rows, _cache_row(read, found)]


def _cache_row(config: Any, found: dict[str, list[int]]) -> dict[str, Any]:
    """What vLLM makes of `kv_cache_scheme`, and of the scales of keys and values in the files."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsKVCacheMethod,
    )
    from vllm.model_executor.model_loader.weight_utils import maybe_remap_kv_scale_name

    scheme = config.kv_cache_scheme
    row: dict[str, Any] = {"layer": "self_attn.attn", "scheme": None if scheme is None else str(scheme["type"])}
    layer: Any = torch.nn.Module()
    whole = torch.nn.Module()
    layer.num_kv_heads = 2  # of which only scales by head know
    try:
        CompressedTensorsKVCacheMethod(config).create_weights(layer)
    except (ValueError, NotImplementedError) as error:  # how vLLM says that it does not take a cache's scheme
        return {**row, "refused": f"{type(error).__name__}: {error}"}
    whole.add_module("attn", layer)
    room = {f"{PREFIX}self_attn.{name}": list(p.shape) for name, p in whole.named_parameters()}
    scales = {name: size for name, size in found.items() if name.endswith(("k_scale", "v_scale"))}
    loaded = {name: maybe_remap_kv_scale_name(name, room) for name in scales}
    row["scales"] = sorted(name for name in loaded.values() if name is not None)
    row["wrong"] = [name for name, to in loaded.items() if to is None or room[to] != scales[name]]
    return row


def _row(config: Any, name: str, found: dict[str, list[int]], capability: tuple[int, int]) -> dict[str, Any]:
    layer, parts = Linear(), parts_of(name)
    row: dict[str, Any] = {"layer": name}
    try:
        scheme = config.get_scheme(layer=layer, layer_name=PREFIX + name)
        if scheme is None:
            return {**row, "scheme": "none", "inputs": "16 bits"}
        row["scheme"] = type(scheme).__name__
        first = "weight" if f"{parts[0]}.weight" in found else "weight_packed"
        rows = [found[f"{part}.{first}"][0] for part in parts]
        columns = found[f"{parts[0]}.{first}"][1]
        if first == "weight_packed":
            columns = columns * 32 // scheme.num_bits
        layer.logical_widths = rows
        scheme.create_weights(
            layer=layer,
            output_size=sum(rows),
            input_size=columns,
            output_partition_sizes=rows,
            input_size_per_partition=columns,
            params_dtype=torch.float16,
            weight_loader=lambda *_: None,
        )
        kernels = (getattr(scheme, name, None) for name in ("kernel", "fp8_linear", "linear_kernel"))
        row["kernel"] = next((type(kernel).__name__ for kernel in kernels if kernel is not None), "none")
        row["wrong"] = wrong_tensors(layer, parts, found)
        row["inputs"] = "16 bits"
        if "Int8ScaledMM" in row["kernel"]:
            row["inputs"] = "int8"
        elif row["kernel"] == "HummingLinearKernel":
            row["inputs"] = humming_inputs(scheme, capability)
        elif row["scheme"] == "CompressedTensorsW8A8Fp8":
            row["inputs"] = "fp8, " + ("a scale in the files" if scheme.is_static_input_scheme else "a scale a token")
    # By these vLLM says that it does not take a scheme, or misses a package: an answer, printed in its own words.
    except (ValueError, NotImplementedError, AssertionError, RuntimeError, ImportError) as error:
        row["refused"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return row


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    for name in sys.argv[1:]:
        print(json.dumps({"export": name, "rows": judged(Path(name))}))
