"""`int-quantized` of the compressed-tensors format: which runs are stored so, and how."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from compressed_tensors.config import CompressionFormat
from torch import Tensor

from ...boa import scheme as ours
from ...boa.solver.rounding import Quantized
from .compressed_floats import FORMATS


def in_integers(scheme: ours.QuantizationScheme) -> bool:
    """Whether `int-quantized` is the layout by which vLLM computes a scheme in integers.

    That is W8A8, a scale per output channel, and W4A8 with zero points of inputs, as its kernel on processors has them.
    W4A8 without these is `pack-quantized`, which its kernels on GPUs read.
    """
    weights, inputs = scheme.weights, scheme.input_activations
    if not (weights.symmetric and {weights.type, inputs.type} == {"int"}):
        return False
    if (inputs.num_bits, inputs.group_size) != (8, None):
        return False
    eight = (weights.num_bits, weights.group_size) == (8, None)
    return eight or (weights.num_bits == 4 and not inputs.symmetric)


def stored_as(schemes: Iterable[ours.QuantizationScheme]) -> CompressionFormat:
    """How a run whose layers have these schemes is stored: `int-quantized` where vLLM computes all that is quantized
    `in_integers`; else as the first one's weights are.
    """
    quantized = [scheme for scheme in schemes if scheme.weights.quantizes]
    if quantized and all(map(in_integers, quantized)):
        return CompressionFormat.int_quantized
    return FORMATS.get(quantized[0].weights.format if quantized else "int", FORMATS["int"])


def as_int8(result: Quantized, bits: int) -> dict[str, Tensor]:
    """One symmetric projection of at most 8 bits in `int-quantized`: integers (out, in), scale (out, groups)."""
    integers = (result.integers.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    return {"weight": integers, "weight_scale": result.scale.to(torch.float16)}
