"""GGUF, the format of llama.cpp: one file with weights, sizes and tokenizer.

`gguf_blocks` has the types and what each holds exactly, `gguf_architectures` what llama.cpp computes. A scale of more
than 32 weights is repeated. Where llama.cpp's RoPE turns neighbours and transformers' turns halves, rows of queries and
keys are reordered. Gemma's norms multiply by one more than their weight: the file has the sum. Phi-3's projections lie
in merged tensors and experts in one tensor of three dimensions, as readers have them.

A feed-forward width that is no multiple of 32 is filled up with channels of zeros, which changes nothing: the
activation of 0 times 0 goes into the columns that are added.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH_NAMES,
    MODEL_TENSOR,
    TENSOR_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    TensorNameMap,
    get_tensor_name_map,
)
from torch import Tensor

from ...boa.solver.rounding import Quantized
from ...errors import InputError
from ...models.families import Family
from ..finished import Finished, refuse_layers, refuse_online
from ..scheme_layers import refuse_floats
from ..writing import SHARD_BYTES, fresh_folder, write_extras
from . import gguf_tokenizer
from .gguf_architectures import ARCHITECTURES, architecture, config_of, instead
from .gguf_blocks import BLOCK, TYPES, Array, to_blocks
from .gguf_metadata import add_sizes, rope_factors
from .gguf_metadata import check as check_metadata

_DENSE = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}


def file_name(bits: int, symmetric: bool = True) -> str:
    """The file in the export's folder."""
    return f"model-{TYPES[bits, symmetric].name}.gguf"


def type_of(bits: int, symmetric: bool) -> GGMLQuantizationType:
    """The type of a layer's tensor.

    Raises:
        InputError: there is none for its weights.
    """
    if (bits, symmetric) in TYPES:
        return TYPES[bits, symmetric]
    grid = {True: "symmetric", False: "asymmetric"}
    held = ", ".join(f"{grid[key[1]]} of {key[0]} ({kind.name})" for key, kind in TYPES.items())
    change = "--weights.symmetric" if (bits, True) in TYPES else "--weights.bits 4"
    raise InputError(
        f"GGUF holds these weights exactly: {held} bits; and this run has {grid[symmetric]} ones of {bits}: quantize "
        f"with {change}, or use --format native."
    )


def check(run: Finished) -> None:
    """Check that the format holds the run exactly.

    Raises:
        InputError: it does not; the sentence says why and what to use instead.
    """
    spec, shape = run.spec, run.shape
    row = architecture(run)
    refuse_layers(spec, "GGUF")
    refuse_online(spec, "GGUF", server="llama.cpp")
    refuse_floats(run, "GGUF")
    type_of(spec.bits, spec.symmetric)
    if spec.group_size and spec.group_size % BLOCK:
        raise InputError(
            f"GGUF has a scale for {BLOCK} weights, and this run one for {spec.group_size}: quantize with "
            f"--weights.group_size {BLOCK} or none, or {instead(run)}."
        )
    for what, width in (("hidden size", shape.hidden), ("attention width", shape.query_width)):
        if width % BLOCK:
            raise InputError(
                f"GGUF packs {BLOCK} weights of a row together, and the {what} {width} is no multiple of it: "
                f"{instead(run)}."
            )
    check_metadata(run, row)
    gguf_tokenizer.check(run)


def permute(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys (heads * d, ...) from transformers' order to llama.cpp's: halves become neighbours."""
    halves = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(rows.shape)


def _padded(result: Quantized, rows: int, columns: int) -> Quantized:
    """The projection with rows of zeros added, and columns of about zero; a group per row where columns are."""
    r, c = result.integers.shape
    if (r, c) == (rows, columns):
        return result
    groups = result.scale.shape[1]
    scale, zero = torch.zeros(2, rows, groups)
    scale[:r], zero[:r] = result.scale, result.zero
    integers = zero[:, :1].to(torch.uint8).repeat(1, columns)
    integers[:r, :c] = result.integers
    return Quantized(integers, scale, zero)


def padded_ffn(run: Finished) -> int:
    """The feed-forward width in the file."""
    return -(-run.shape.ffn // BLOCK) * BLOCK


def stored_in(family: Family, part: str) -> str:
    """The layer of a block that a projection is stored in: of experts all in one, of merged ones their layer."""
    for merged in family.merged:
        if part.startswith(f"{merged.name}."):
            return merged.name
    return re.sub(rf"^({re.escape(family.experts)})\.\d+\.", r"\1.", part) if family.experts else part


def norms_of(family: Family) -> tuple[str | None, ...]:
    """The norms of a block."""
    f = family
    return (f.attention_norm, f.mlp_norm, f.attention_post_norm, f.mlp_post_norm, f.query_norm, f.key_norm)


def name_in(names: TensorNameMap, family: Family, index: int, part: str) -> str:
    """The gguf package's name for a layer of a block."""
    found = names.get_name(f"{family.layers}.{index}.{part}")
    if found is None:
        raise InputError(f"the installed gguf package has no name for {part} of '{family.model_type}': update it.")
    return str(found)


def tensors(run: Finished, *, dense: bool = False) -> Iterator[tuple[str, Array, GGMLQuantizationType]]:
    """All tensors of the file: name, data, type; `dense` unpacks the quantized ones to float32."""
    f, s, row = run.family, run.shape, ARCHITECTURES[run.family.model_type]
    names, ffn = get_tensor_name_map(row.arch, s.blocks), padded_ffn(run)
    heads = {f.query: s.query_heads, f.key: s.key_heads} if row.permuted else {}
    outer = run.outer_layers().untied()
    yield _dense(_outer(MODEL_TENSOR.TOKEN_EMBD), outer.embedding[:])
    factors = rope_factors(run)
    if factors is not None:
        yield _dense(_outer(MODEL_TENSOR.ROPE_FREQS), factors)
    for index in range(s.blocks):
        quantized, others = run.split(index)
        stored: dict[str, list[Array]] = {}
        kind = GGMLQuantizationType.F32 if dense else type_of(run.spec.bits, run.spec.symmetric)
        for name, result in quantized.items():
            if name in heads:
                h = heads[name]
                result = Quantized(permute(result.integers, h), permute(result.scale, h), permute(result.zero, h))
            site = f.sites[name]
            rows = ffn if site == "gate_up" else run.rows[name]
            padded = _padded(result, rows, ffn if site == "down" else run.columns[name])
            data = padded.dequantize().numpy() if dense else to_blocks(padded, kind)
            stored.setdefault(stored_in(f, name), []).append(data)
        for name, blocks in stored.items():
            whole = np.stack(blocks) if f.experts and name.startswith(f.experts) else np.concatenate(blocks)
            yield f"{name_in(names, f, index, name)}.weight", whole, kind
        for name, tensor in others.items():
            part, _, last = name.rpartition(".")
            wide = permute(tensor, heads[part]) if part in heads else tensor
            if part in (f.gate, f.up):
                wide = torch.nn.functional.pad(wide, (0, ffn - s.ffn))
            offset = f.norm_offset if part in norms_of(f) else 0.0
            yield _dense(f"{name_in(names, f, index, part)}.{last}", wide.float() + offset)
    yield _dense(_outer(MODEL_TENSOR.OUTPUT_NORM), outer.norm.float() + f.norm_offset)
    if not outer.tied:  # llama.cpp takes the embedding where there is none
        yield _dense(_outer(MODEL_TENSOR.OUTPUT), outer.head[:])


def _outer(tensor: MODEL_TENSOR) -> str:
    return f"{TENSOR_NAMES[tensor]}.weight"


def _dense(name: str, tensor: Tensor) -> tuple[str, Array, GGMLQuantizationType]:
    kind = _DENSE[tensor.dtype]
    if tensor.dtype == torch.bfloat16:
        return name, tensor.contiguous().view(torch.uint8).numpy(), kind
    return name, tensor.contiguous().numpy(), kind


def write(run: Finished, folder: Path, *, shard_bytes: int = SHARD_BYTES, dense: bool = False) -> None:
    """Write a finished run in this format: the file, and config and tokenizer beside it. The file is not split.

    `dense` unpacks the weights to float32, to see what a reader computes besides rounding its inputs.

    Raises:
        InputError: the format cannot hold the run.
    """
    check(run)
    row, spec, ffn = architecture(run), run.spec, padded_ffn(run)
    fresh_folder(folder)
    file = "model-F32.gguf" if dense else file_name(spec.bits, spec.symmetric)
    writer = GGUFWriter(folder / file, MODEL_ARCH_NAMES[row.arch])
    add_sizes(writer, run, row, ffn)
    packed = LlamaFileType[f"MOSTLY_{type_of(spec.bits, spec.symmetric).name}"]
    writer.add_file_type(LlamaFileType.ALL_F32 if dense else packed)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    gguf_tokenizer.add_tokenizer(writer, run)
    # The headers come first, so tensors are made twice: no more than a block of them is in memory.
    for name, data, kind in tensors(run, dense=dense):
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, data, _ in tensors(run, dense=dense):
        writer.write_tensor_data(data)
    writer.close()
    write_extras(folder, run.folder, config_of(run, ffn))
