"""The compressed-tensors format, `pack-quantized`: what vLLM serves and what transformers loads by itself.

A weight is `scale * (integer - zero)`, as in a run; the format has signed numbers, so integers and zero points are
shifted by 2^(b-1) on their way in and out. Scales stay float16: the integers were chosen for exactly these values.

| | |
|---|---|
| `weight_packed` | (out, ceil(in * bits / 32)) int32, values without a gap |
| `weight_scale` | (out, groups) float16 |
| `weight_zero_point` | (ceil(out * bits / 32), groups) int32; asymmetric grids only |
| `weight_shape` | [out, in] |
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme
from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix
from torch import Tensor

from ...boa.solver.rounding import Quantized
from ...errors import InputError
from ...models.families import Family, family_of
from ...models.shape import Shape
from ...rotation.hadamard import Hadamard
from ..finished import Finished, projection_columns, projection_rows, refuse_layers, refuse_layout, refuse_online
from ..reading import check_shape, read_config, read_shapes
from ..spec import Spec
from ..writing import SHARD_BYTES, write_checkpoint

NAME = "compressed-tensors"
VLLM_ALONE = "rotated online: for vLLM alone, not transformers"  # short enough to be quoted whole


def stock_clip(bits: int) -> float:
    """The clip ratio that equals the format's own dynamic scale, max |x| / ((2^b - 1) / 2), where ours has 2^(b-1) - 1.

    Example: 14/15 for 4 bits, 254/255 for 8.
    """
    return (2.0 ** (bits - 1) - 1) / ((2.0**bits - 1) / 2)


def check(run: Finished) -> None:
    """Check that the format, as stock transformers reads it, computes what the run computes.

    Raises:
        InputError: it does not; the sentence says why and what to use instead.
    """
    spec = run.spec
    refuse_layout(run.family, NAME)
    refuse_layers(spec, NAME)
    refuse_online(spec, NAME, activations=True, inputs=True)
    transforms(spec, run.family, run.shape)
    if spec.activation_bits == 16:
        return
    if not spec.symmetric:
        raise InputError(
            f"{NAME} with quantized activations needs symmetric weights, and this run has zero points: quantize with "
            "--weights.symmetric, or use --format native."
        )
    if not spec.activation_symmetric:
        raise InputError(
            f"{NAME} takes symmetric dynamic activations, and these have zero points: quantize with "
            "--activations.symmetric, or use --format native."
        )
    if (spec.r4 or spec.online_r1) and spec.activation_group:
        raise InputError(
            f"{NAME} with online rotations is for vLLM alone, which takes activations per token and not in groups of "
            f"{spec.activation_group}: quantize with --activations.group_size none, or use --format native."
        )
    clip = stock_clip(spec.activation_bits)
    if spec.activation_search or abs(spec.activation_clip - clip) > 1e-6:
        raise InputError(
            f"{NAME} cannot hold clip ratios of activations, and its readers use {clip:.7f} at "
            f"{spec.activation_bits} bits: quantize with --no-activations.search --activations.clip {clip:.16g}, "
            "or use --format native."
        )


def transforms(spec: Spec, family: Family, shape: Shape) -> TransformConfig | None:
    """R1 and R4 where they are online, as vLLM runs them: Sylvester's Hadamard matrix of a layer's inputs, or of equal
    blocks of them. None where neither is.

    Raises:
        InputError: the run has another matrix.
    """
    groups = {}
    for name, (hadamard, layers) in _online(spec, family, shape).items():
        if hadamard.base != 1:
            other = "--rotation.r4_blocks" if name == "R4" else "--rotation.r1 merged"
            raise InputError(
                f"the run needs {name} of width {hadamard.size}, no power of two, and {NAME} can express Sylvester's "
                f"Hadamard matrices alone: quantize with {other}, or use --format native."
            )
        blocks = hadamard.order if hadamard.blocks > 1 else None
        online = TransformArgs(targets=[f"re:.*{layer}$" for layer in layers], location="input")
        groups[name] = TransformScheme(type="hadamard", head_dim=blocks, apply=[online])
    return TransformConfig(config_groups=groups) if groups else None


def _online(spec: Spec, family: Family, shape: Shape) -> dict[str, tuple[Hadamard, tuple[str, ...]]]:
    """What turns the inputs of layers as the model runs, and whose."""
    r1, r4 = Hadamard.of(shape.hidden) if spec.online_r1 else None, spec.r4_of(shape)
    found = {"R1": (r1, (family.query, family.key, family.value, *family.mlp_inputs)), "R4": (r4, family.downs)}
    return {name: (hadamard, layers) for name, (hadamard, layers) in found.items() if hadamard is not None}


def quantization_config(spec: Spec, family: Family, shape: Shape) -> dict[str, Any]:
    """`quantization_config` of config.json; the head is left as it is.

    Asymmetric weights carry `dequantize`: transformers 5.23 makes room for unpacked zero points while it loads a packed
    checkpoint, and takes them only where it unpacks all weights at once. vLLM does not read this key, nor
    `quantization_status`, which keeps transformers from loading a run with R4: it would leave the rotation out.
    """
    weights = QuantizationArgs(
        num_bits=spec.bits,
        type=QuantizationType.INT,
        symmetric=spec.symmetric,
        strategy=QuantizationStrategy.GROUP if spec.group_size else QuantizationStrategy.CHANNEL,
        group_size=spec.group_size,
    )
    inputs = None
    if spec.activation_bits < 16:
        inputs = QuantizationArgs(
            num_bits=spec.activation_bits,
            type=QuantizationType.INT,
            symmetric=True,
            strategy=QuantizationStrategy.GROUP if spec.activation_group else QuantizationStrategy.TOKEN,
            group_size=spec.activation_group,
            dynamic=True,
        )
    # The format is set: what the library infers for quantized activations is another one, without packing.
    packed = CompressionFormat.pack_quantized
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs, format=packed)
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=packed.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[family.head],
    )
    data: dict[str, Any] = config.model_dump(mode="json")
    online = transforms(spec, family, shape)
    if online is not None:
        data |= {"transform_config": online.model_dump(mode="json"), "quantization_status": VLLM_ALONE}
    return data if spec.symmetric else {**data, "dequantize": True}


def compress(result: Quantized, bits: int, symmetric: bool) -> dict[str, Tensor]:
    """One projection in the format: integers (out, in), scale and zero (out, groups) -> the tensors of the table above.

    Raises:
        ValueError: symmetric, and a zero point is not 2^(b-1).
    """
    middle = 2 ** (bits - 1)
    shifted = (result.integers.to(torch.int16) - middle).to(torch.int8)
    tensors = {
        "weight_packed": pack_to_int32(shifted, bits),
        "weight_scale": result.scale.to(torch.float16),
        "weight_shape": torch.tensor(result.integers.shape),
    }
    zero = (result.zero.to(torch.int16) - middle).to(torch.int8)
    if not symmetric:
        tensors["weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0)
    elif bool(zero.any()):
        raise ValueError("the run is symmetric by its recipe, and has other zero points than the middle of the grid")
    return tensors


def groups(run: Finished) -> Iterator[dict[str, Tensor]]:
    """All tensors of the checkpoint by their full names, a decoder block at a time."""
    yield from run.groups(lambda result, args: compress(result, args.num_bits, args.symmetric))
    for name, (hadamard, (layer, *_)) in _online(run.spec, run.family, run.shape).items():
        # One matrix for all layers, which share it in vLLM; its kernel does without, its plain product does not.
        matrix = deterministic_hadamard_matrix(hadamard.order, torch.bfloat16)
        yield {f"{run.family.layers}.0.{layer}.{name}_input.weight": matrix}


def write(run: Finished, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a finished run in this format.

    Raises:
        InputError: the format cannot hold the run.
    """
    check(run)
    config = {**run.config, "quantization_config": quantization_config(run.spec, run.family, run.shape)}
    write_checkpoint(folder, run.folder, config, groups(run), shard_bytes=shard_bytes)


def inspect(folder: Path) -> None:
    """Compare the headers of a checkpoint with its config: transformers fills gaps with noise.

    Raises:
        InputError: a file is damaged, a tensor is missing or of another shape, or the config is not one of ours.
    """
    config, quantization = read_config(folder, NAME)
    try:
        stored = CompressionFormat(quantization.get("format"))
        if quantization.get("quantization_status") == VLLM_ALONE:
            quantization["quantization_status"] = QuantizationStatus.COMPRESSED.value
        (scheme,) = QuantizationConfig.model_validate(quantization).config_groups.values()
        weights = scheme.weights
        if stored != CompressionFormat.pack_quantized or weights is None:
            raise ValueError(f"format {quantization.get('format')}, where pack-quantized is read")
        family, shape = family_of(str(config.get("model_type")), str(folder)), Shape.of(SimpleNamespace(**config))
    except (ValueError, TypeError, AttributeError) as error:
        what = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"{folder / 'config.json'} cannot be used ({what}): export the model again.") from error
    found = read_shapes(folder)
    bits = weights.num_bits
    for index in range(shape.blocks):
        for name in family.projections:
            rows, columns = projection_rows(family, shape)[name], projection_columns(family, shape)[name]
            groups = -(-columns // weights.group_size) if weights.group_size else 1
            expected: dict[str, tuple[int, ...]] = {
                "weight_packed": (rows, -(-columns * bits // 32)),
                "weight_scale": (rows, groups),
                "weight_shape": (2,),
            }
            if not weights.symmetric:
                expected["weight_zero_point"] = (-(-rows * bits // 32), groups)
            for part, size in expected.items():
                check_shape(folder, f"{family.layers}.{index}.{name}.{part}", size, found)
    check_shape(folder, f"{family.embedding}.weight", (shape.vocabulary, shape.hidden), found)
    if not config.get("tie_word_embeddings"):
        check_shape(folder, f"{family.head}.weight", (shape.vocabulary, shape.hidden), found)
    check_shape(folder, f"{family.final_norm}.weight", (shape.hidden,), found)
    if f"{family.layers}.{shape.blocks}.{family.down}.weight_packed" in found:
        raise InputError(f"{folder} has more blocks than the {shape.blocks} of its config.json: export it again.")
