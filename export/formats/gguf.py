"""GGUF, the format of llama.cpp: one file with weights, sizes and tokenizer.

Symmetric weights are Q4_0 or Q8_0 exactly: both mean `d * q` with a float16 d for 32 weights and a signed q.

| | a block of 32 weights |
|---|---|
| Q4_0 | d, then 16 bytes: value i in the low half of byte i, value i + 16 in the high half; q is the value less 8 |
| Q8_0 | d, then 32 signed bytes q |

A scale of more than 32 weights is repeated. Rows of queries and keys are reordered, since llama.cpp's RoPE turns
neighbours where transformers' turns halves. A feed-forward width that is no multiple of 32 is filled up with channels
of zeros, which changes nothing: silu(0) * 0 goes into columns of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from ...boa.solver.rounding import Quantized
from ...errors import InputError
from ..finished import Finished, refuse_layers, refuse_online
from ..writing import SHARD_BYTES, fresh_folder, write_extras
from .gguf_metadata import add_sizes, add_tokenizer, rope_factors
from .gguf_metadata import check as check_metadata

BLOCK = 32
TYPES = {4: GGMLQuantizationType.Q4_0, 8: GGMLQuantizationType.Q8_0}
_FILE_TYPES = {4: LlamaFileType.MOSTLY_Q4_0, 8: LlamaFileType.MOSTLY_Q8_0}
_DENSE = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
Array = np.ndarray[Any, Any]


def file_name(bits: int) -> str:
    """The file in the export's folder."""
    return f"model-{TYPES[bits].name}.gguf"


def check(run: Finished) -> None:
    """Check that the format holds the run exactly.

    Raises:
        InputError: it does not; the sentence says why and what to use instead.
    """
    spec, shape = run.spec, run.shape
    if run.family.model_type != "llama":
        raise InputError(
            f"GGUF is written for models of the Llama architecture, and this is a '{run.family.model_type}': "
            "use --format native."
        )
    refuse_layers(spec, "GGUF")
    refuse_online(spec, "GGUF")
    if spec.bits not in TYPES or not spec.symmetric:
        grid = "symmetric" if spec.symmetric else "asymmetric"
        raise InputError(
            f"GGUF holds symmetric weights of 4 bits (Q4_0) or 8 (Q8_0) exactly, and this run has {grid} ones of "
            f"{spec.bits}: quantize with --weights.symmetric --weights.bits 4, or use --format compressed-tensors."
        )
    if spec.group_size and spec.group_size % BLOCK:
        raise InputError(
            f"GGUF has a scale for {BLOCK} weights, and this run one for {spec.group_size}: quantize with "
            f"--weights.group_size {BLOCK} or none, or use --format compressed-tensors."
        )
    for what, width in (("hidden size", shape.hidden), ("attention width", shape.query_heads * shape.head_dim)):
        if width % BLOCK:
            raise InputError(
                f"GGUF packs {BLOCK} weights of a row together, and the {what} {width} is no multiple of it: "
                "use --format compressed-tensors."
            )
    check_metadata(run)


def to_blocks(result: Quantized, bits: int) -> Array:
    """One projection, symmetric: integers (out, in), scale (out, groups) -> (out, bytes) uint8, Q4_0 or Q8_0."""
    rows, columns = result.integers.shape
    integers = result.integers.view(rows, -1, BLOCK).numpy()
    repeat = columns // BLOCK // result.scale.shape[1]
    scale = result.scale.to(torch.float16).repeat_interleave(repeat, 1).numpy()[..., None].view(np.uint8)
    low, high = integers[..., :16], integers[..., 16:]
    values = low | (high << 4) if bits == 4 else integers ^ 128  # less 128, as two's complement
    return np.concatenate([scale, values.astype(np.uint8)], -1).reshape(rows, -1)


def permute(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys (heads * d, ...) from transformers' order to llama.cpp's: halves become neighbours."""
    halves = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(rows.shape)


def _padded(result: Quantized, bits: int, rows: int, columns: int) -> Quantized:
    """The projection with rows and columns of zeros added; a group per row where columns are."""
    r, c = result.integers.shape
    if (r, c) == (rows, columns):
        return result
    groups = result.scale.shape[1]
    integers = torch.full((rows, columns), 2 ** (bits - 1), dtype=torch.uint8)
    integers[:r, :c] = result.integers
    scale = torch.zeros(rows, groups)
    scale[:r] = result.scale
    return Quantized(integers, scale, torch.full((rows, groups), 2.0 ** (bits - 1)))


def padded_ffn(run: Finished) -> int:
    """The feed-forward width in the file."""
    return -(-run.shape.ffn // BLOCK) * BLOCK


def _names(run: Finished) -> dict[str, str]:
    """Parts of a block -> llama.cpp's names for them."""
    f = run.family
    return {
        f.query: "attn_q", f.key: "attn_k", f.value: "attn_v", f.output: "attn_output",
        f.gate: "ffn_gate", f.up: "ffn_up", f.down: "ffn_down",
        f.attention_norm: "attn_norm", f.mlp_norm: "ffn_norm",
    }  # fmt: skip


def tensors(run: Finished) -> Iterator[tuple[str, Array, GGMLQuantizationType]]:
    """All tensors of the file: name, data, type."""
    f, s, bits, names = run.family, run.shape, run.spec.bits, _names(run)
    ffn = padded_ffn(run)
    heads = {f.query: s.query_heads, f.key: s.key_heads}
    outer = run.outer_layers()
    yield _dense("token_embd.weight", outer.embedding[:])
    factors = rope_factors(run)
    if factors is not None:
        yield _dense("rope_freqs.weight", factors)
    for index in range(s.blocks):
        quantized, others = run.split(index)
        for name, result in quantized.items():
            if name in heads:
                h = heads[name]
                result = Quantized(permute(result.integers, h), permute(result.scale, h), permute(result.zero, h))
            rows = ffn if name in (f.gate, f.up) else run.rows[name]
            padded = _padded(result, bits, rows, ffn if name == f.down else run.columns[name])
            yield f"blk.{index}.{names[name]}.weight", to_blocks(padded, bits), TYPES[bits]
        for name, tensor in others.items():
            part, _, kind = name.rpartition(".")
            wide = permute(tensor, heads[part]) if part in heads else tensor
            if part in (f.gate, f.up):
                wide = torch.nn.functional.pad(wide, (0, ffn - s.ffn))
            yield _dense(f"blk.{index}.{names[part]}.{kind}", wide.float())
    yield _dense("output_norm.weight", outer.norm.float())
    if not outer.tied:  # llama.cpp takes the embedding where there is none
        yield _dense("output.weight", outer.head[:])


def _dense(name: str, tensor: Tensor) -> tuple[str, Array, GGMLQuantizationType]:
    kind = _DENSE[tensor.dtype]
    if tensor.dtype == torch.bfloat16:
        return name, tensor.contiguous().view(torch.uint8).numpy(), kind
    return name, tensor.contiguous().numpy(), kind


def write(run: Finished, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a finished run in this format: the file, and config and tokenizer beside it. The file is not split.

    Raises:
        InputError: the format cannot hold the run.
    """
    check(run)
    fresh_folder(folder)
    writer = GGUFWriter(folder / file_name(run.spec.bits), "llama")
    add_sizes(writer, run, padded_ffn(run))
    writer.add_file_type(_FILE_TYPES[run.spec.bits])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_tokenizer(writer, run)
    # The headers come first, so tensors are made twice: no more than a block of them is in memory.
    for name, data, kind in tensors(run):
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, data, _ in tensors(run):
        writer.write_tensor_data(data)
    writer.close()
    write_extras(folder, run.folder, {**run.config, "intermediate_size": padded_ffn(run)})
