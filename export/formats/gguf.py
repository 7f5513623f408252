"""GGUF, the format of llama.cpp: one file with weights, sizes and tokenizer.

`ggml` has the types, what each holds exactly, and which a tensor gets; `gguf_architectures` what llama.cpp computes. A
scale of more weights than a block is repeated. Where llama.cpp's RoPE turns neighbours and transformers' turns halves,
rows of queries and keys are reordered. Gemma's norms multiply by one more than their weight: the file has the sum.
Phi-3's projections lie in merged tensors and experts in one tensor of three dimensions, as readers have them.

A feed-forward width that is no multiple of a block is filled up with channels of zeros, which changes nothing: the
activation of 0 times 0 goes into the columns that are added.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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

from ...boa.online.served_cache import NEIGHBOURS
from ...boa.scheme import TWO_LEVELS, QuantizationArgs
from ...boa.solver.rounding import Quantized
from ...errors import InputError
from ...models.families import Family
from ...models.matrices import Matrix, spans
from ..finished import Finished, refuse_online
from ..ggml.gguf_blocks import Array, block_of, to_blocks
from ..ggml.gguf_types import check_types, file_kind, file_name, file_type, padded_ffn, stored_in, type_of
from ..ggml.k_blocks import to_super_blocks
from ..packed_matrix import PackedMatrix
from ..writing import SHARD_BYTES, fresh_folder, write_extras
from . import gguf_tokenizer
from .gguf_architectures import ARCHITECTURES, architecture, config_of
from .gguf_metadata import add_sizes, rope_factors
from .gguf_metadata import check as check_metadata

_DENSE = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}


def check(run: Finished) -> None:
    """Check that the format holds the run exactly.

    Raises:
        InputError: it does not; the sentence says why and what to use instead.
    """
    spec, row = run.spec, architecture(run)
    refuse_online(spec, "GGUF", server="llama.cpp")
    check_types(run)
    check_metadata(run, row)
    gguf_tokenizer.check(run)


def warning(run: Finished) -> str | None:
    """What a user should know of an export."""
    if not run.spec.turns_head:
        return None
    return (
        "the head of this run is its packed embedding behind a matrix, which llama.cpp has no place for: the file has "
        "their product in 16 bits; with --weights.head 0.5 --head.bits 8 --head.symmetric the head is packed too."
    )


def permute(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys (heads * d, ...) from transformers' order to llama.cpp's: halves become neighbours."""
    halves = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(rows.shape)


def _padded(result: Quantized, rows: int, columns: int, block: int) -> Quantized:
    """The projection with rows of zeros added, and columns of about zero, in groups of a `block` where it has some."""
    r, c = result.integers.shape
    if (r, c) == (rows, columns):
        return result
    groups = result.scale.shape[1]
    parts = [result.scale, result.zero]
    if groups > 1 and c != columns:
        parts = [part.repeat_interleave(c // groups // block, 1) for part in parts]
        groups = columns // block
    scale, zero = torch.zeros(2, rows, groups)
    for whole, part in zip((scale, zero), parts, strict=True):
        whole[:r, : part.shape[1]] = part
    integers = zero.to(torch.uint8).repeat_interleave(columns // groups, 1)
    integers[:r, :c] = result.integers
    return Quantized(integers, scale, zero)


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
    heads = {f.query: s.query_heads, f.key: s.key_heads} if f.model_type in NEIGHBOURS else {}
    outer = run.outer_layers().untied()
    yield _end(MODEL_TENSOR.TOKEN_EMBD, outer.embedding, run.spec.outer(f.embedding), dense=dense)
    factors = rope_factors(run)
    if factors is not None:
        yield _dense(_outer(MODEL_TENSOR.ROPE_FREQS), factors)
    for index in range(s.blocks):
        quantized, others = run.split(index)
        schemes = run.spec.schemes(f, index)
        stored: dict[str, list[Array]] = {}
        kinds: dict[str, GGMLQuantizationType] = {}
        for name, scheme in schemes.items():
            site, where = f.sites[name], stored_in(f, name)
            size = ffn if site == "gate_up" else run.rows[name], ffn if site == "down" else run.columns[name]
            if f.shared and name.startswith(f"{f.shared}."):
                size = run.rows[name], run.columns[name]
            if name in quantized:
                result = quantized[name]
                if name in heads:
                    h = heads[name]
                    result = Quantized(permute(result.integers, h), permute(result.scale, h), permute(result.zero, h))
                kind = type_of(scheme.weights)
                data, kinds[where] = _packed(_padded(result, *size, block_of(kind)), kind, dense=dense)
            else:
                weight = others.pop(f"{name}.weight")
                weight = permute(weight, heads[name]) if name in heads else weight
                added = (0, size[1] - weight.shape[1], 0, size[0] - weight.shape[0])
                _, data, kinds[where] = _dense(name, torch.nn.functional.pad(weight, added))
            stored.setdefault(where, []).append(data)
        for name, blocks in stored.items():
            whole = np.stack(blocks) if f.experts and name.startswith(f.experts) else np.concatenate(blocks)
            yield f"{name_in(names, f, index, name)}.weight", whole, kinds[name]
        for name, tensor in others.items():
            part, _, last = name.rpartition(".")
            wide = permute(tensor, heads[part]) if part in heads else tensor
            if part in (f.gate, f.up):
                wide = torch.nn.functional.pad(wide, (0, ffn - s.ffn))
            wide = wide.flatten() if part == f.shared_gate else wide
            offset = f.norm_offset if part in norms_of(f) else 0.0
            yield _dense(f"{name_in(names, f, index, part)}.{last}", wide.float() + offset)
    yield _dense(_outer(MODEL_TENSOR.OUTPUT_NORM), outer.norm.float() + f.norm_offset)
    if not outer.tied:  # llama.cpp takes the embedding where there is none
        yield _end(MODEL_TENSOR.OUTPUT, outer.head, run.spec.outer(f.head), dense=dense)


def _packed(result: Quantized, kind: GGMLQuantizationType, *, dense: bool) -> tuple[Array, GGMLQuantizationType]:
    if dense:
        return result.dequantize().numpy(), GGMLQuantizationType.F32
    name = kind.name.lower()
    return (to_super_blocks(result, name) if name in TWO_LEVELS else to_blocks(result, kind)), kind


def _end(
    tensor: MODEL_TENSOR, matrix: Matrix, args: QuantizationArgs, *, dense: bool
) -> tuple[str, Array, GGMLQuantizationType]:
    """Embedding or head, in few bits where the run has it so."""
    if not isinstance(matrix, PackedMatrix):
        return _dense(_outer(tensor), matrix[:])
    kind, parts = type_of(args), []
    for rows in spans(matrix):
        result = matrix.quantized(rows)
        data, found = _packed(replace(result, integers=result.integers.contiguous()), kind, dense=dense)
        parts.append(data)
    return _outer(tensor), np.concatenate(parts), found


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
    row, ffn, kind = architecture(run), padded_ffn(run), file_kind(run)
    fresh_folder(folder)
    file = "model-F32.gguf" if dense else file_name(kind)
    writer = GGUFWriter(folder / file, MODEL_ARCH_NAMES[row.arch])
    add_sizes(writer, run, row, ffn)
    writer.add_file_type(LlamaFileType.ALL_F32 if dense else file_type(kind))
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
    write_extras(folder, run.folder, config_of(run, ffn) | {"tie_word_embeddings": run.tied})
