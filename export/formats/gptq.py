"""The GPTQ checkpoint format, versions 2 and 1, for GPTQModel, vLLM and the many kernels that read it.

Of a linear layer with `in` inputs and `out` outputs, and groups of `g` inputs:

| | |
|---|---|
| `qweight` | (in * bits / 32, out) int32: integers packed along the inputs, least significant bits first |
| `qzeros` | (in / g, out * bits / 32) int32: zero points packed along the outputs |
| `scales` | (in / g, out) float16 |
| `g_idx` | (in,) int32: the group of each input |

The weight is `scales[g] * (integer - zero[g])`. `gptq_v2` stores zero points as they are; `gptq`, version 1, stores
them less one, and its readers add the one. Values of 3 bits run across words, 32 of them in 3, which is also how 2, 4
and 8 bits lie: one rule for all.

`bits`, `group_size` and `sym` of the config are of all layers but those that a key of `dynamic` matches from the start
of their names: the first that does counts. `+:` before a regular expression is for other values, `-:` for layers that
are not quantized.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...boa.scheme import QuantizationArgs
from ...boa.solver.rounding import Quantized
from ...errors import InputError
from ...models.families import Family, family_of
from ..finished import Finished, refuse_layout, refuse_online, refuse_sight
from ..packing import pack, unpack
from ..reading import read_config, read_tensors, stock_model
from ..scheme_layers import by_weights, patterns, refuse_ends
from ..writing import SHARD_BYTES, write_checkpoint, write_json

V2, V1 = "gptq_v2", "gptq"
BITS = (2, 3, 4, 8)
SERVED = (4, 8)  # that vLLM takes, of symmetric weights
CONFIG = "quantize_config.json"


def check(run: Finished, version: str = V2) -> None:
    """Check that the format holds the run.

    Raises:
        InputError: it does not; the sentence says why and what to use instead.
    """
    refuse_layout(run.family, "GPTQ")
    refuse_sight(run.family, "GPTQ")
    refuse_ends(run, "GPTQ")
    refuse_online(run.spec, "GPTQ", server="vllm")
    for args, layers in by_weights(run, "GPTQ")[0].items():
        if args.num_bits not in BITS:
            raise InputError(
                f"GPTQ has 2, 3, 4 and 8 bits, and the run has {args.num_bits}: use --format compressed-tensors."
            )
        if version == V1 and not args.symmetric:
            raise InputError(
                "version 1 of GPTQ stores zero points less one, so that a zero point of 0 is lost, and this run is "
                "asymmetric: use --format gptq, or quantize with --weights.symmetric."
            )
        whole = 32 if args.num_bits == 3 else 32 // args.num_bits
        for name in (name for name in run.family.projections if any(layer.endswith(name) for layer in layers)):
            for what, size in (("inputs", run.columns[name]), ("outputs", run.rows[name])):
                if size % whole:
                    raise InputError(
                        f"GPTQ packs {whole} values of {args.num_bits} bits together, and the {size} {what} of {name} "
                        f"are no multiple of {whole}: use --format compressed-tensors."
                    )


def refused_by_vllm(weights: Iterable[QuantizationArgs]) -> str:
    """Why vLLM refuses GPTQ weights like these, and what it takes, in a sentence; empty where it takes them.

    Its config knows symmetric weights of 4 and 8 bits (vLLM 0.32.0, `AutoGPTQConfig`), of versions 1 and 2 alike: it
    reads no zero points.
    """
    other = next((args for args in weights if not args.symmetric or args.num_bits not in SERVED), None)
    if other is None:
        return ""
    kind = "symmetric" if other.symmetric else "asymmetric"
    return (
        f"Of GPTQ vLLM takes symmetric weights of {' and '.join(map(str, SERVED))} bits alone, and refuses this one, "
        f"with {kind} ones of {other.num_bits}: for vLLM quantize with --recipe w4a16 --weights.symmetric, or export "
        "with --format compressed-tensors."
    )


def warning(run: Finished) -> str | None:
    """What a user should know of an export before serving it; None where there is nothing."""
    return refused_by_vllm(by_weights(run, "GPTQ")[0]) or None


def quantize_config(run: Finished, version: str) -> dict[str, Any]:
    """The content of quantize_config.json, and `quantization_config` of config.json."""
    layers, full = by_weights(run, "GPTQ")
    first, *others = layers
    dynamic: dict[str, dict[str, Any]] = {}
    for args in others:
        dynamic |= {f"+:{pattern}": _fields(args) for pattern in patterns(layers[args], run, fused=True)}
    dynamic |= {f"-:{pattern}": {} for pattern in patterns(full, run, fused=True)}
    return {
        "quant_method": "gptq",
        "checkpoint_format": version,
        **_fields(first),
        "desc_act": False,  # the columns were rounded in another order, and are stored in their own
        "lm_head": False,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _fields(args: QuantizationArgs) -> dict[str, Any]:
    return {"bits": args.num_bits, "group_size": args.group_size or -1, "sym": args.symmetric}


def to_gptq(result: Quantized, bits: int, version: str = V2) -> dict[str, Tensor]:
    """One projection: integers (out, in), scale and zero (out, groups) -> the tensors of the table above."""
    inputs, groups = result.integers.shape[1], result.scale.shape[1]
    zero = result.zero.to(torch.int64) - int(version == V1)
    return {
        "qweight": pack(result.integers, bits).T.contiguous(),
        "qzeros": pack(zero.T, bits),
        "scales": result.scale.to(torch.float16).T.contiguous(),
        "g_idx": (torch.arange(inputs) // (inputs // groups)).to(torch.int32),
    }


def from_gptq(tensors: Mapping[str, Tensor], bits: int, version: str = V2) -> Quantized:
    """The inverse of `to_gptq`, where the inputs of a group lie together.

    Raises:
        ValueError: the shapes contradict each other, or `g_idx` names a group that is not there.
    """
    qweight, qzeros, scales, g_idx = (tensors[part] for part in ("qweight", "qzeros", "scales", "g_idx"))
    groups, outputs = scales.shape
    inputs = g_idx.numel()
    if qzeros.shape[0] != groups or qweight.shape[1] != outputs:
        raise ValueError(f"qweight {tuple(qweight.shape)}, qzeros {tuple(qzeros.shape)}, scales {tuple(scales.shape)}")
    if inputs % groups or not torch.equal(g_idx.long(), torch.arange(inputs) // (inputs // groups)):
        raise ValueError(f"g_idx does not put {inputs} inputs in {groups} groups, one after another")
    integers = unpack(qweight.T.contiguous(), bits, inputs)
    zero = unpack(qzeros, bits, outputs).T.float() + int(version == V1)
    return Quantized(integers, scales.T.float(), zero)


def write(run: Finished, folder: Path, *, shard_bytes: int = SHARD_BYTES, version: str = V2) -> None:
    """Write a finished run in version 2 of this format, or in version 1.

    Raises:
        InputError: the format cannot hold the run.
    """
    check(run, version)
    quantization = quantize_config(run, version)
    config = {**run.config, "quantization_config": quantization}
    write_checkpoint(
        folder,
        run.folder,
        config,
        run.groups(lambda result, args: to_gptq(result, args.num_bits, version)),
        shard_bytes=shard_bytes,
    )
    write_json(folder / CONFIG, quantization)


def read(folder: Path) -> nn.Module:
    """The stock transformers model of a checkpoint in this format, unpacked to float32; it follows the table above.

    Raises:
        InputError: the checkpoint is damaged, contradicts its config, or is of another version.
    """
    config, quantization = read_config(folder, "gptq")
    family = family_of(str(config.get("model_type")), str(folder))
    version = quantization.get("checkpoint_format")
    if version not in (V1, V2):
        raise InputError(f"{folder} is in the format {version}, and {V1} and {V2} are read: export it again.")
    return stock_model(folder, config, _dense(folder, family, quantization, version))


def _settings(folder: Path, quantization: Mapping[str, Any], name: str) -> tuple[int, Any]:
    """Bits and group size of a layer by its full name, as the config has them.

    Raises:
        InputError: they are of no use, or the config says that the layer is not quantized.
    """
    try:
        found = dict(quantization)
        for pattern, fields in (quantization.get("dynamic") or {}).items():
            if re.match(pattern.removeprefix("+:").removeprefix("-:"), name):
                found = {"bits": None} if pattern.startswith("-:") else found | fields
                break
    except (AttributeError, TypeError, re.error) as error:
        raise InputError(f"dynamic in {folder / 'config.json'} is damaged ({error}): export it again.") from error
    if found.get("bits") not in BITS:
        raise InputError(
            f"{folder / 'config.json'} says {found.get('bits')} bits, and GPTQ has 2, 3, 4 and 8: export it again."
        )
    return found["bits"], found.get("group_size")


def _dense(folder: Path, family: Family, quantization: Mapping[str, Any], version: str) -> dict[str, Tensor]:
    """All weights in float32, by the names of the unquantized model."""
    tensors = read_tensors(folder)
    packed = sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))
    if not any(name.endswith(family.projections) for name in packed):
        raise InputError(f"{folder} has no packed weights, which its config.json speaks of: export it again.")
    parts = ("qweight", "qzeros", "scales", "g_idx")
    state = {name: tensor.float() for name, tensor in tensors.items() if not name.endswith(parts)}
    for name in packed:
        bits, group_size = _settings(folder, quantization, name)
        found = {part: tensors[f"{name}.{part}"] for part in parts if f"{name}.{part}" in tensors}
        if len(found) < len(parts):
            missing = next(part for part in parts if part not in found)
            raise InputError(f"{folder} has no tensor {name}.{missing}: copy or export it again.")
        inputs, groups = found["g_idx"].numel(), found["scales"].shape[0]
        if groups != (1 if group_size == -1 else inputs / group_size):
            raise InputError(
                f"{folder}: tensor {name}.scales has {groups} groups, and config.json says group_size {group_size} for "
                f"{inputs} inputs: they do not belong together, export the model again."
            )
        try:
            state[f"{name}.weight"] = from_gptq(found, bits, version).dequantize()
        except ValueError as error:
            raise InputError(
                f"{folder}: {name} and {bits} bits of config.json do not belong together ({error}): export it again."
            ) from error
    return state
