"""What vLLM computes of low-bit integer inputs that `pack-quantized` of compressed-tensors speaks of.

As the config, scheme and kernel classes of vLLM 0.32.0 choose it with humming-kernels 0.1.20, asked on a processor with
the platform made to say CUDA (`benchmarks/vllm_contract.py`, docs/formats.md). Only Humming's kernels round inputs, and
others come before them for weights of 4 and 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..boa.scheme import FULL, QuantizationScheme

BACKEND = "--linear-backend humming"
HOPPER = 90
"""The compute capability from which inputs of 4 bits are computed in 8: its tensor cores have lost int4."""
OTHER_KERNELS = (4, 8)
"""Bits of weights that kernels with inputs in 16 bits take before Humming's, where no backend is asked for."""


def low_inputs(schemes: Iterable[QuantizationScheme]) -> list[QuantizationScheme]:
    """Of schemes, those with integer weights and inputs."""
    return [
        scheme
        for scheme in schemes
        if scheme.weights.quantizes and scheme.input_activations.quantizes and scheme.input_activations.format == "int"
    ]


def humming_bits(scheme: QuantizationScheme, capability: int) -> int | None:
    """Bits that Humming's kernels round the inputs of a scheme to on a GPU of a compute capability, such as 89.

    16 where they leave them; None where vLLM refuses the scheme.
    """
    weights, inputs = scheme.weights, scheme.input_activations
    if inputs.num_bits not in (4, 8) or not inputs.symmetric:
        return None
    if inputs.num_bits == 8:
        return FULL if weights.group_size or inputs.group_size else 8
    return 8 if capability >= HOPPER or weights.num_bits > 4 else 4


def served_inputs(schemes: Iterable[QuantizationScheme]) -> str | None:
    """What vLLM computes of a run's inputs, in sentences; None where they are not quantized."""
    low = low_inputs(schemes)
    if not low:
        return None
    refused = next((scheme for scheme in low if humming_bits(scheme, HOPPER) is None), None)
    if refused is not None:
        return (
            f"vLLM refuses {refused.shown}, since it has inputs of 4 and 8 bits alone: for vLLM quantize with "
            "activations.bits 4 or 8."
        )
    if any(scheme.weights.num_bits in OTHER_KERNELS for scheme in low):
        said = f"vLLM leaves the inputs of this export in 16 bits, silently, unless a GPU serves it with {BACKEND}"
    else:
        said = "vLLM serves this export on GPUs alone"
    found: dict[str, str] = {}
    for scheme in low:
        below, above = humming_bits(scheme, HOPPER - 1), humming_bits(scheme, HOPPER)
        what = f"{below} bits" if below == above else f"{below} bits, and {above} from compute capability 9.0 on"
        found[f"W{scheme.weights.num_bits}A{scheme.input_activations.num_bits}"] = what
    rounded = "; ".join(f"inputs of {name} in {what}" for name, what in found.items())
    return f"{said} (package humming-kernels): {rounded}, as its classes say; not seen running."
