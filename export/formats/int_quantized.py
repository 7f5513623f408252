"""`int-quantized` of the compressed-tensors format: which runs are stored so, and how."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from compressed_tensors.config import CompressionFormat
from torch import Tensor

from ...boa import scheme as ours
from ...boa.solver.rounding import Quantized
from .compressed_floats import FORMATS


def stored_as(schemes: Iterable[ours.QuantizationScheme]) -> CompressionFormat:
    """How a run whose layers have these schemes is stored: `int-quantized` where all that is quantized is W8A8, a scale
    per output channel and per token, both symmetric; else as the first one's weights are.
    """
    eight = ours.QuantizationArgs(8, None, True)
    quantized = [scheme for scheme in schemes if scheme.weights.quantizes]
    if quantized and all(s.weights == s.input_activations == eight for s in quantized):
        return CompressionFormat.int_quantized
    return FORMATS[quantized[0].weights.format if quantized else "int"]


def as_int8(result: Quantized) -> dict[str, Tensor]:
    """One symmetric projection of 8 bits in `int-quantized`: integers (out, in), scale (out, 1)."""
    integers = (result.integers.to(torch.int16) - 128).to(torch.int8)
    return {"weight": integers, "weight_scale": result.scale.to(torch.float16)}
