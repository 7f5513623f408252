"""The compressed-tensors format: what vLLM serves and what transformers loads by itself.

Floating point is in `compressed_floats`. A weight of integers is `scale * (integer - zero)`, as in a run; the format
has signed numbers, so integers and zero points are shifted by 2^(b-1) on their way in and out. Scales stay float16: the
integers were chosen for exactly these values.

`pack-quantized` holds all of them:

| | |
|---|---|
| `weight_packed` | (out, ceil(in * bits / 32)) int32, values without a gap |
| `weight_scale` | (out, groups) float16 |
| `weight_zero_point` | (ceil(out * bits / 32), groups) int32; asymmetric grids only |
| `weight_shape` | [out, in] |

`int-quantized` holds what vLLM then computes in integers, W8A8 and W4A8 whose inputs have zero points:

| | |
|---|---|
| `weight` | (out, in) int8 |
| `weight_scale` | (out, groups) float16 |

A scheme is a group of the config, with patterns on the names of its layers; layers in 16 bits are ignored. A
quantized head is a group by its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
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

from ...boa import scheme as ours
from ...boa.online.transforms import FOUND
from ...boa.solver.rounding import Quantized
from ...errors import InputError
from ...models.families import Family
from ...models.seeing.whole_model import linears_beside
from ...models.shape import Shape
from ...rotation.hadamard import Hadamard
from ..compressed_inputs import NAME, check_inputs
from ..finished import Finished, has_plain_layout, refuse_layout, refuse_online
from ..joined_layers import divided_layer, joined_names
from ..scheme_layers import by_scheme, by_weights, divided, patterns, quantized_ends, refuse_ends
from ..spec import Spec
from ..vllm_inputs import served_inputs
from ..writing import SHARD_BYTES, write_checkpoint
from .compressed_floats import compress_floats, float_args, refuse_mixed, static_float8
from .int_quantized import as_int8, stored_as

PROCESSORS = (
    "vLLM computes 4-bit weights of this layout in integers on processors, and its kernels on GPUs do not read it: for "
    "these quantize with --recipe w4a8."
)
VLLM_ALONE = "rotated online: for vLLM alone, not transformers"  # short enough to be quoted whole


def warning(run: Finished) -> str | None:
    """What a user should know of an export before serving it: where vLLM computes it otherwise; None: nowhere."""
    schemes = by_scheme(run)
    if stored_as(schemes) == CompressionFormat.int_quantized:
        return PROCESSORS if any(scheme.weights.num_bits == 4 for scheme in schemes) else None
    said = served_inputs(schemes)
    online = run.spec.r4 or run.spec.online_r1
    return said if said is None or online else f"{said} transformers computes what the run computes."


def check(run: Finished) -> None:
    """Check that the format, as stock transformers reads it, computes what the run computes.

    Raises:
        InputError: it does not; the sentence says why and what to use instead.
    """
    spec = run.spec
    refuse_layout(run.family, NAME, joins=True)
    refuse_ends(run, NAME, head=True)  # transformers 5.24.0 starts a packed embedding anew, and finds no weight
    # What vLLM runs online is found by the ends of names, which what sees has too.
    plain = has_plain_layout(run.family)
    whole_inputs = plain and run.family.sight is None
    refuse_online(spec, NAME, activations=not run.family.experts, inputs=whole_inputs, server="vllm", scales=plain)
    _refuse_parts(run)
    online, split = transforms(spec, run.family, run.shape), divided(run)
    if online is not None and split:
        raise InputError(
            f"{NAME} with online rotations is for vLLM alone, which computes {split} as one layer, and these have "
            "several schemes: override all of them, or use --format native."
        )
    weights, _ = by_weights(run, NAME, floats=True)
    kinds = [*weights, *(args for args in quantized_ends(run).values() if args not in weights)]
    refuse_mixed(kinds, NAME)
    whole = stored_as(by_scheme(run)) == CompressionFormat.int_quantized
    if whole and quantized_ends(run):
        raise InputError(
            f"{NAME} is written in one layout, int-quantized for this run, and its head is in few bits: use --format "
            "native, or quantize with --head.bits 16."
        )
    for scheme, layers in by_scheme(run).items():
        if scheme.input_activations.quantizes:
            check_inputs(spec, scheme, layers[0], whole)
    if not all(args.symmetric for args in quantized_ends(run).values()):
        raise InputError(
            f"{NAME} is written with a head without zero points, and this run has them: quantize with "
            "--head.symmetric, or use --format native."
        )
    if len(kinds) > 1 and not all(args.symmetric for args in kinds):
        first, second, *_ = (ours.QuantizationScheme(args).shown for args in kinds)
        raise InputError(
            f"{NAME} with zero points is unpacked by transformers as if all layers had one scheme, and this run has "
            f"{first} and {second}: quantize with --weights.symmetric, or use --format native."
        )


def _refuse_parts(run: Finished) -> None:
    """Refuse schemes that a merged layer cannot have, and those that transformers does not unpack experts by.

    Raises:
        InputError: there are some.
    """
    for index in range(run.shape.blocks):
        if name := divided_layer(run.spec.schemes(run.family, index), run.family.at(index)):
            raise InputError(
                f"{NAME} has {name} of block {index} as one layer, and its parts have several schemes: override all of "
                "them, or use --format native."
            )
    if not run.family.experts:
        return
    weights, full = by_weights(run, NAME, floats=True)
    apart = any(f".{run.family.experts}." in name for name in full)
    if apart or len(weights) > 1 or not all(args.symmetric and args.format == "int" for args in weights):
        raise InputError(
            f"{NAME} of models with experts is unpacked by transformers as symmetric integers of one scheme, and this "
            "run has others: quantize with --weights.symmetric and one scheme for all experts, or use --format native."
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
                f"Hadamard matrices alone: quantize with {other}, with --rotation.blocks, or use --format native."
            )
        blocks = hadamard.order if hadamard.blocks > 1 else None
        online = TransformArgs(targets=[f"re:.*{layer}$" for layer in layers], location="input")
        groups[name] = TransformScheme(type="hadamard", head_dim=blocks, apply=[online])
    return TransformConfig(config_groups=groups) if groups else None


def _online(spec: Spec, family: Family, shape: Shape) -> dict[str, tuple[Hadamard, tuple[str, ...]]]:
    """What turns the inputs of layers as the model runs, and whose."""
    r1, r4 = spec.r1_of(shape), spec.r4_of(shape)
    found = {"R1": (r1, (family.query, family.key, family.value, *family.mlp_inputs)), "R4": (r4, family.downs)}
    return {name: (hadamard, layers) for name, (hadamard, layers) in found.items() if hadamard is not None}


def quantization_config(run: Finished) -> dict[str, Any]:
    """`quantization_config` of config.json; left as they are: what sees, layers in 16 bits, mostly the head too.

    Asymmetric weights carry `dequantize`: transformers 5.23 makes room for unpacked zero points while it loads a packed
    checkpoint, and takes them only where it unpacks all weights at once; so do floating-point weights alone, which it
    would leave in bfloat16 in a model of another dtype. vLLM does not read this key, nor
    `quantization_status`, which keeps transformers from loading a run with R4: it would leave the rotation out.
    """
    # The format is set: what the library infers for quantized activations is another one, without packing.
    layers = by_scheme(run)
    stored = stored_as(layers)
    ignored = [name for scheme, names in layers.items() if not scheme.weights.quantizes for name in names]
    blocks = range(run.shape.blocks)
    ignored += [f"{run.family.layers}.{i}.{name}" for i in blocks for name in run.family.at(i).deciders]
    quantized = {scheme: names for scheme, names in layers.items() if scheme.weights.quantizes}
    ends = quantized_ends(run)
    groups = {}
    for index, (scheme, names) in enumerate(quantized.items()):
        # No layer is in two groups, so that no reader must choose.
        several = len(quantized) > 1 or bool(ends)
        names = joined_names(names, run.family)
        targets = [f"re:{pattern}" for pattern in patterns(names, run)] if several else ["Linear"]
        inputs = _inputs(scheme.input_activations, dynamic=run.spec.activation_dynamic)
        parts = {"weights": _weights(scheme.weights), "input_activations": inputs}
        groups[f"group_{index}"] = QuantizationScheme(targets=targets, format=stored, **parts)
    for module, args in ends.items():
        groups[f"group_{len(groups)}"] = QuantizationScheme(targets=[module], format=stored, weights=_weights(args))
    config = QuantizationConfig(
        config_groups=groups,
        format=stored.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        kv_cache_scheme=static_float8() if run.spec.cache_format == "fp8" else None,
        ignore=[
            *({run.family.head} - set(ends)),
            *linears_beside(run.transformers_config(), run.family),
            *(f"re:{pattern}" for pattern in patterns(joined_names(ignored, run.family), run)),
        ],
    )
    data: dict[str, Any] = config.model_dump(mode="json")
    online = transforms(run.spec, run.family, run.shape)
    if online is not None:
        data |= {"transform_config": online.model_dump(mode="json"), "quantization_status": VLLM_ALONE}
    symmetric = all(scheme.weights.symmetric for scheme in quantized)
    floats = any(scheme.weights.format != "int" for scheme in quantized) and not run.spec.quantizes_inputs
    return {**data, "dequantize": True} if floats or not symmetric else data


def _weights(args: ours.QuantizationArgs) -> QuantizationArgs:
    if args.format != "int":
        return float_args(args)
    return QuantizationArgs(
        num_bits=args.num_bits,
        type=QuantizationType.INT,
        symmetric=args.symmetric,
        strategy=QuantizationStrategy.GROUP if args.group_size else QuantizationStrategy.CHANNEL,
        group_size=args.group_size,
    )


def _inputs(args: ours.QuantizationArgs, *, dynamic: bool) -> QuantizationArgs | None:
    if not args.quantizes:
        return None
    if args.format == "fp8" and not dynamic:
        return static_float8()
    if args.format != "int":
        return float_args(args, inputs=True)
    return QuantizationArgs(
        num_bits=args.num_bits,
        type=QuantizationType.INT,
        symmetric=args.symmetric,
        strategy=QuantizationStrategy.GROUP if args.group_size else QuantizationStrategy.TOKEN,
        group_size=args.group_size,
        dynamic=True,
    )


def compress(result: Quantized, bits: int, symmetric: bool) -> dict[str, Tensor]:
    """One projection in `pack-quantized`: integers (out, in), scale and zero (out, groups) -> the tensors of its table.

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


def _compressed(result: Quantized, args: ours.QuantizationArgs) -> dict[str, Tensor]:
    return compress(result, args.num_bits, args.symmetric) if args.format == "int" else compress_floats(result, args)


def groups(run: Finished) -> Iterator[dict[str, Tensor]]:
    """All tensors of the checkpoint by their full names, a decoder block at a time."""
    whole = stored_as(by_scheme(run)) == CompressionFormat.int_quantized
    for group in run.groups((lambda result, args: as_int8(result, args.num_bits)) if whole else _compressed):
        yield {name: t.float() if name.rpartition(".")[2] in FOUND else t for name, t in group.items()}
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
    config = {**run.config, "quantization_config": quantization_config(run)}
    write_checkpoint(folder, run.folder, config, groups(run), shard_bytes=shard_bytes)
