"""Which quantized inputs compressed-tensors holds."""

from __future__ import annotations

from ..boa.online.activations import OWN, SEARCHED, stock_clip
from ..boa.scheme import QuantizationScheme
from ..errors import InputError
from .spec import Spec

NAME = "compressed-tensors"


def check_inputs(spec: Spec, scheme: QuantizationScheme, layer: str, whole: bool) -> None:
    """Check a scheme that quantizes inputs, which `layer` has; `whole`: weights are stored in bytes.

    Raises:
        InputError: compressed-tensors does not hold it, or its readers compute something else.
    """
    inputs = scheme.input_activations
    if scheme.weights.quantizes and inputs.format != scheme.weights.format:
        raise InputError(
            f"{NAME} has weights and inputs of one format, and {layer} has {scheme.weights.format} and "
            f"{inputs.format}: use --format native."
        )
    if not scheme.weights.quantizes:
        raise InputError(
            f"{NAME} leaves layers with 16-bit weights as they are, and {layer} has its inputs in {inputs.num_bits} "
            "bits: override activations.bits=16 for it too, or use --format native."
        )
    if not scheme.weights.symmetric:
        raise InputError(
            f"{NAME} with quantized activations needs symmetric weights, and this run has zero points: quantize with "
            "--weights.symmetric, or use --format native."
        )
    if not inputs.symmetric and not whole:
        raise InputError(
            f"{NAME} takes symmetric dynamic activations, zero points in W8A8 and W4A8 alone, and {layer} has "
            f"{scheme.shown} with them: quantize with --activations.symmetric, or use --format native."
        )
    if (spec.r4 or spec.online_r1) and inputs.group_size and inputs.format == "int":
        raise InputError(
            f"{NAME} with online rotations is for vLLM alone, which takes activations per token and not in groups of "
            f"{inputs.group_size}: quantize with --activations.group_size none, or use --format native."
        )
    if inputs.format != "int":
        return
    clip = stock_clip(inputs.num_bits, symmetric=inputs.symmetric)
    wide = spec.activation_search and inputs.num_bits > SEARCHED  # which clips nothing
    same = clip == 1 if wide else not spec.activation_search and abs(spec.activation_clip - clip) <= 1e-6
    if spec.activation_convention == OWN and not same:
        raise InputError(
            f"{NAME} cannot hold clip ratios of activations, and its readers use {clip:.7f} at "
            f"{inputs.num_bits} bits: quantize with --activations.convention {NAME}, or use --format native."
        )
