"""MLX's affine format, which mlx-lm loads.

A weight is `scale * q + bias`, with an unsigned q, for groups of 32, 64 or 128 inputs; bias is `-scale * zero` here.

| tensor | shape, type | what it holds |
|---|---|---|
| `weight` | (out, in * bits / 32) uint32 | q, value i of a row from bit `i * bits` on |
| `scales`, `biases` | (out, groups) | of one type: float16 where it holds each bias exactly, else float32 |

A scale of more inputs is repeated for groups that MLX has. config.json says `quantization: {group_size, bits}`, and
beside that by the name of a layer `{group_size, bits}` where it has others, and false where it is not quantized, which
a layer without `scales` is not either. Embedding and head are layers like these, and a tied head is the embedding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...boa.scheme import QuantizationArgs
from ...boa.solver.rounding import Quantized
from ...errors import InputError
from ...models.families import FAMILIES as ROWS
from ...models.families import Family
from ...models.names import renamed
from ...models.running import what_it_is
from ..finished import Finished, projection_columns, refuse_layout, refuse_online
from ..joined_layers import joined_names
from ..packing import pack, unpack
from ..reading import read_tensors, stock_model
from ..scheme_layers import by_weights, quantized_ends
from ..writing import SHARD_BYTES, write_checkpoint
from .gguf_architectures import window

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (128, 64, 32)
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "glm4", "ministral3", "smollm3"),
    *("granite", "olmo2", "olmo3", "ernie4_5", "seed_oss", "hunyuan_v1_dense", "lfm2"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "dots1", "minimax_m2"),
)
"""Model types that mlx-lm was seen to compute, with the names that transformers gives their tensors."""
WINDOWED = ("gemma3_text", "smollm3", "olmo3")
"""Those whose windows it has."""

STACKED = {"dots1": "experts"}
"""Where mlx-lm has the experts of a block, where that is not `switch_mlp`."""
_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)\.(\w+)")
_LAYERS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
TIED = ("gemma2", "lfm2")
"""Those of which mlx-lm reads no head, and multiplies by the embedding."""


def check(run: Finished) -> None:
    """Check that the format holds the run.

    Raises:
        InputError: it does not; the sentence says why and what to use instead.
    """
    refuse_layout(run.family, "MLX", joins=True)
    refuse_online(run.spec, "MLX")
    if run.family.model_type not in FAMILIES:
        raise InputError(
            f"MLX is written for {', '.join(FAMILIES)}, and this is a '{run.family.model_type}': use --format native."
        )
    if run.family.model_type in TIED and not run.tied:
        raise InputError(
            f"mlx-lm's '{run.family.model_type}' has its embedding for a head, and this run has a head of its own: use "
            "--format native, or quantize with --rotation.r1 online or none, --weights.head 0 and --head.bits 16."
        )
    if run.family.model_type == "qwen2_moe" and run.shape.dense_blocks:
        raise InputError(
            "mlx-lm's 'qwen2_moe' has experts in every block, and this model has not: use --format native."
        )
    sizes = group_sizes(run)
    apart = run.family.experts and any(f".{run.family.experts}." in name for name in by_weights(run, "MLX")[1])
    if run.family.experts and (apart or len(sizes) > 1):
        raise InputError(
            "MLX is written with one scheme where there are experts, and this run has others: quantize without "
            "overrides, or use --format native."
        )


def warning(run: Finished) -> str | None:
    """What a user should know of an export before serving it; None where there is nothing."""
    size = None if run.family.model_type in WINDOWED else window(run)
    if size is None:
        return None
    return (
        f"mlx-lm computes '{run.family.model_type}' without windows: it computes what the run does for no more tokens "
        f"than one holds, {size}."
    )


def group_sizes(run: Finished) -> dict[QuantizationArgs, int]:
    """Inputs that share a scale, as MLX has them, by what the weights of layers have: the most that divide their groups
    and all widths.

    Raises:
        InputError: it has none that do, or not these bits.
    """
    blocks, _ = by_weights(run, "MLX")
    layers = {args: _widths(run, names) for args, names in blocks.items()}
    for module, args in quantized_ends(run).items():
        layers.setdefault(args, {})[module] = run.shape.hidden
    return {args: _group_size(args, widths) for args, widths in layers.items()}


def _widths(run: Finished, layers: Iterable[str]) -> dict[str, int]:
    """How many inputs these projections have, by their names inside a block."""
    found = dict[str, int]()
    for layer in layers:
        index, _, name = layer.removeprefix(f"{run.family.layers}.").partition(".")
        found[name] = projection_columns(run.family, run.shape, int(index))[name]
    return found


def _group_size(args: QuantizationArgs, columns: Mapping[str, int]) -> int:
    if args.num_bits not in BITS:
        raise InputError(f"MLX has 2, 3, 4, 5, 6 and 8 bits, and the run has {args.num_bits}: use --format native.")
    widths = {name: args.group_size or number for name, number in columns.items()}
    found = next((size for size in GROUPS if not any(width % size for width in widths.values())), None)
    if found is None:
        name, width = next((name, width) for name, width in widths.items() if width % GROUPS[-1])
        raise InputError(
            f"MLX has groups of 32, 64 and 128 inputs, and {width} of {name} share a scale: use --format native, or "
            "quantize with a group_size of 32, 64 or 128 where that divides the width."
        )
    return found


def quantization(run: Finished) -> dict[str, Any]:
    """`quantization` of config.json."""
    sizes = group_sizes(run)
    layers, full = by_weights(run, "MLX")
    fields = {args: {"group_size": size, "bits": args.num_bits} for args, size in sizes.items()}
    first, *others = layers
    data: dict[str, Any] = {**fields[first], "mode": "affine"}
    for args in others:
        data |= dict.fromkeys(joined_names(layers[args], run.family), fields[args])
    return (
        data
        | dict.fromkeys(joined_names(full, run.family), False)
        | {name: fields[args] for name, args in quantized_ends(run).items()}
    )


def config_of(run: Finished) -> dict[str, Any]:
    """config.json with the older names of RoPE's fields beside `rope_parameters`, in place of which mlx-lm has
    defaults; and the number of experts by the name that the hub's files have.
    """
    rope = dict(getattr(run.transformers_config(), "rope_parameters", None) or {})
    # Which some of mlx-lm's classes want to be told.
    older: dict[str, Any] = {"rope_scaling": None, "head_dim": run.shape.head_dim}
    if run.family.rope_by_layer:
        local, rope = rope["sliding_attention"], rope["full_attention"]
        older["rope_local_base_freq"] = local["rope_theta"]
    if "rope_theta" in rope:
        older["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    if run.family.model_type == "lfm2":
        older["block_dim"] = run.shape.hidden
    if run.family.model_type == "minimax_m2":
        turned = float(rope.get("partial_rotary_factor") or 1.0)
        older |= {"rotary_dim": int(run.shape.head_dim * turned), "shared_intermediate_size": 0}
    if run.family.experts_field:
        older[run.family.experts_field] = run.family.expert_count
    return {**older, **run.config}


def to_mlx(result: Quantized, bits: int, group: int) -> dict[str, Tensor]:
    """One projection: integers (out, in), scale and zero (out, groups) -> the tensors of the table above."""
    times = result.integers.shape[1] // result.scale.shape[1] // group
    scale, bias = result.scale.float(), -result.scale.float() * result.zero.float()
    half = all(torch.equal(part.half().float(), part) for part in (scale, bias))
    dtype = torch.float16 if half else torch.float32
    scales, biases = (part.repeat_interleave(times, 1).to(dtype) for part in (scale, bias))
    return {"weight": pack(result.integers, bits).view(torch.uint32), "scales": scales, "biases": biases}


def stacked(tensors: Mapping[str, Tensor], name_of: str = "switch_mlp") -> dict[str, Tensor]:
    """Tensors with those of all experts of a block as one, as mlx-lm computes them; `name_of` its module of them."""
    found, experts = dict[str, Tensor](), dict[str, dict[int, Tensor]]()
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            where, index, layer, part = match.groups()
            experts.setdefault(f"{where}.{name_of}.{_LAYERS.get(layer, layer)}.{part}", {})[int(index)] = tensor
        else:
            found[name] = tensor
    for name, parts in experts.items():
        dtype = max((part.dtype for part in parts.values()), key=lambda kind: kind.itemsize)
        found[name] = torch.stack([parts[i].to(dtype) for i in range(len(parts))])
    return found


def from_mlx(tensors: dict[str, Tensor], bits: int, group: int) -> Tensor:
    """The weight (out, in) in float32 of the tensors of one projection, or (experts, out, in) of all experts'.

    Raises:
        ValueError: their shapes contradict each other.
    """
    if tensors["weight"].ndim == 3:  # of experts
        parts = ({name: part[i] for name, part in tensors.items()} for i in range(len(tensors["weight"])))
        return torch.stack([from_mlx(part, bits, group) for part in parts])
    scales, biases = tensors["scales"].float(), tensors["biases"].float()
    words = (len(scales), scales.shape[1] * group * bits // 32)
    if scales.shape != biases.shape or tensors["weight"].shape != words:
        raise ValueError(f"they are of shapes {', '.join(str(tuple(tensor.shape)) for tensor in tensors.values())}")
    integers = unpack(tensors["weight"].view(torch.int32), bits, scales.shape[1] * group).float()
    return (integers.unflatten(1, (-1, group)) * scales[..., None] + biases[..., None]).flatten(1)


def write(run: Finished, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a finished run in this format.

    Raises:
        InputError: the format cannot hold the run.
    """
    check(run)
    sizes = group_sizes(run)
    config = {**config_of(run), "tie_word_embeddings": run.tied, "quantization": quantization(run)}
    where = STACKED.get(run.family.model_type, "switch_mlp")
    groups = run.groups(lambda result, args: to_mlx(result, args.num_bits, sizes[args]))
    groups = (stacked(group, where) for group in groups)
    write_checkpoint(folder, run.folder, config, groups, shard_bytes=shard_bytes)


def read(folder: Path) -> nn.Module:
    """The stock transformers model of a checkpoint in this format, unpacked to float32; it follows the table above.

    Raises:
        InputError: the checkpoint is damaged, or contradicts its config.
    """
    try:
        config = what_it_is(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        stored = config.pop("quantization")
        whole = int(stored["bits"]), int(stored["group_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(f"{folder} holds no MLX checkpoint ({what}): export it again.") from error
    tensors = read_tensors(folder)
    packed = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    state = {name: tensor.float() for name, tensor in tensors.items() if name.rpartition(".")[0] not in packed}
    for name in packed:
        try:
            own = stored.get(name)
            bits, group = whole if own is None else (int(own["bits"]), int(own["group_size"]))
            parts = {part: tensors[f"{name}.{part}"] for part in ("weight", "scales", "biases")}
            state[f"{name}.weight"] = from_mlx(parts, bits, group)
            if f"{name}.bias" in tensors:
                state[f"{name}.bias"] = tensors[f"{name}.bias"].float()
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{folder}: the tensors of {name} and config.json do not belong together ({error}): export it again."
            ) from error
    return stock_model(folder, config, _as_transformers(state, ROWS[config["model_type"]]))


def _as_transformers(state: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Dense tensors by the names of transformers' modules, gates and ups of experts end to end."""
    found = {renamed(name, family): tensor for name, tensor in state.items()}
    where = f".{STACKED.get(family.model_type, 'switch_mlp')}."
    for name in [name for name in state if family.experts and name.endswith(f"{where}gate_proj.weight")]:
        stem = name.removesuffix("gate_proj.weight")
        block = name.partition(".mlp.")[0].partition(".block_sparse_moe.")[0]
        parts = ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (found.pop(renamed(f"{stem}{part}.weight", family)) for part in parts)
        found |= {
            f"{block}.{family.experts}.gate_up_proj": torch.cat([gate, up], 1),
            f"{block}.{family.experts}.down_proj": down,
        }
    return found
