"""Floating point in the compressed-tensors format: `nvfp4-pack-quantized`, `mxfp4-pack-quantized`, `float-quantized`.

| | |
|---|---|
| `weight_packed` | (out, in / 2) uint8, two codes of E2M1 a byte, the first in the lower half |
| `weight_scale` | (out, in / 16) E4M3, or (out, in / 32) uint8, the exponent + 127 |
| `weight_global_scale` | (1,) float32, by which NVFP4 divides its scales |
| `input_global_scale` | (1,) float32, the same of inputs in NVFP4 |
| `input_scale` | (1,) float32, of inputs in static FP8 |
| `k_scale`, `v_scale` | (1,) float32, of an attention module: of keys and of values in FP8 |

`float-quantized`, of FP8, has `weight` (out, in) E4M3 and `weight_scale` (out, 1) bfloat16.

These are the native format's own numbers: a weight is exact in every dtype that a reader unpacks it to.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import DynamicType, QuantizationArgs, QuantizationStrategy, QuantizationType
from torch import Tensor

from ...boa import scheme as ours
from ...boa.solver.rounding import Quantized
from ...errors import InputError
from ..packing import packed_parts, to_float8

FORMATS = {
    "int": CompressionFormat.pack_quantized,
    "nvfp4": CompressionFormat.nvfp4_pack_quantized,
    "mxfp4": CompressionFormat.mxfp4_pack_quantized,
    "fp8": CompressionFormat.float_quantized,
}
SCALES = {"nvfp4": torch.float8_e4m3fn, "mxfp4": torch.uint8}


def float_args(args: ours.QuantizationArgs, *, inputs: bool = False) -> QuantizationArgs:
    """What the config says of weights, or of inputs that are quantized as the model runs."""
    if args.format == "fp8":
        return QuantizationArgs(
            num_bits=args.num_bits,
            type=QuantizationType.FLOAT,
            symmetric=True,
            strategy=QuantizationStrategy.TOKEN if inputs else QuantizationStrategy.CHANNEL,
            dynamic=inputs,
        )
    by_tensor = args.format == "nvfp4"
    return QuantizationArgs(
        num_bits=args.num_bits,
        type=QuantizationType.FLOAT,
        symmetric=True,
        strategy=QuantizationStrategy.TENSOR_GROUP if by_tensor else QuantizationStrategy.GROUP,
        group_size=args.group_size,
        dynamic=False if not inputs else DynamicType.LOCAL if by_tensor else True,
        scale_dtype=SCALES[args.format],
        zp_dtype=SCALES[args.format],
    )


def static_float8() -> QuantizationArgs:
    """Of inputs, or of keys and values, in FP8 on a scale that the file has."""
    return QuantizationArgs(
        num_bits=8, type=QuantizationType.FLOAT, symmetric=True, strategy=QuantizationStrategy.TENSOR, dynamic=False
    )


def refuse_mixed(weights: Iterable[ours.QuantizationArgs], name: str) -> None:
    """Refuse weights of several kinds of numbers.

    Raises:
        InputError: there are some.
    """
    found = sorted({args.format for args in weights})
    if len(found) > 1:
        raise InputError(
            f"{name} is written with integers or one kind of floating point alone, and this run has "
            f"{' and '.join(found)}: use --format native."
        )


def compress_floats(result: Quantized, args: ours.QuantizationArgs) -> dict[str, Tensor]:
    """One projection, integers (out, in) of `kernels.levels` and scales (out, groups), as the tensors above."""
    if args.format == "fp8":
        return {"weight": to_float8(result.integers), "weight_scale": packed_parts(result, args)["scale"]}
    parts = packed_parts(result, args)
    packed = parts["qweight"].view(torch.uint8)[:, : result.integers.shape[1] // 2].contiguous()
    found = {"weight_packed": packed, "weight_scale": parts["scale"]}
    return found | ({"weight_global_scale": parts["global_scale"]} if "global_scale" in parts else {})


def float_shapes(args: QuantizationArgs, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's tensors by the last part of their names."""
    if args.num_bits == 8:
        return {"weight": (rows, columns), "weight_scale": (rows, 1)}
    size = args.group_size or columns
    shapes: dict[str, tuple[int, ...]] = {
        "weight_packed": (rows, columns // 2),
        "weight_scale": (rows, columns // size),
    }
    return shapes | ({"weight_global_scale": (1,)} if args.strategy == QuantizationStrategy.TENSOR_GROUP else {})


def input_shapes(args: QuantizationArgs | None) -> dict[str, tuple[int, ...]]:
    """Likewise those of what calibration has found of its input."""
    if args is None or args.dynamic is True:
        return {}
    by_tensor = args.strategy == QuantizationStrategy.TENSOR_GROUP
    return {"input_global_scale" if by_tensor else "input_scale": (1,)}
