"""Four-bit floating point in the compressed-tensors format: `nvfp4-pack-quantized` and `mxfp4-pack-quantized`.

| | |
|---|---|
| `weight_packed` | (out, in / 2) uint8, two codes of E2M1 a byte, the first in the lower half |
| `weight_scale` | (out, in / 16) E4M3, or (out, in / 32) uint8, the exponent + 127 |
| `weight_global_scale` | (1,) float32, by which NVFP4 divides its scales |
| `input_global_scale` | (1,) float32, the same of inputs in NVFP4 |

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
from ..packing import packed_parts

FORMATS = {
    "int": CompressionFormat.pack_quantized,
    "nvfp4": CompressionFormat.nvfp4_pack_quantized,
    "mxfp4": CompressionFormat.mxfp4_pack_quantized,
}
SCALES = {"nvfp4": torch.float8_e4m3fn, "mxfp4": torch.uint8}


def float_args(args: ours.QuantizationArgs, *, inputs: bool = False) -> QuantizationArgs:
    """What the config says of weights, or of inputs that are quantized as the model runs."""
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
    parts = packed_parts(result, args)
    packed = parts["qweight"].view(torch.uint8)[:, : result.integers.shape[1] // 2].contiguous()
    found = {"weight_packed": packed, "weight_scale": parts["scale"]}
    return found | ({"weight_global_scale": parts["global_scale"]} if "global_scale" in parts else {})


def float_shapes(args: QuantizationArgs, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's tensors by the last part of their names."""
    size = args.group_size or columns
    shapes: dict[str, tuple[int, ...]] = {
        "weight_packed": (rows, columns // 2),
        "weight_scale": (rows, columns // size),
    }
    return shapes | ({"weight_global_scale": (1,)} if args.strategy == QuantizationStrategy.TENSOR_GROUP else {})
