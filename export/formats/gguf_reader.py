"""Checks a GGUF file of ours by its own words, before anything loads it; and reads it where transformers does not."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    MODEL_TENSOR,
    MODEL_TENSORS,
    TENSOR_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    dequantize,
    get_tensor_name_map,
)
from torch import Tensor, nn
from transformers import AutoConfig

from ...boa.online.served_cache import NEIGHBOURS
from ...errors import InputError
from ...models.families import family_for
from ...models.shape import Shape
from ..ggml.gguf_blocks import Q2_0, Array, from_q2_0
from ..ggml.gguf_types import stored_in
from ..reading import stock_model
from ..writing import is_tied
from .gguf import name_in, norms_of
from .gguf_architectures import ARCHITECTURES

Sizes = dict[str, int]
_KEYS = (
    "block_count", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length",
)  # fmt: skip
_EXPERTS = ("expert_count", "expert_feed_forward_length", "expert_shared_feed_forward_length")


def inspect(folder: Path) -> Path:
    """The one GGUF file of a folder, whole, with the tensors and shapes that its metadata asks for.

    Raises:
        InputError: there is none or more than one; it is damaged; its sizes contradict its tensors.
    """
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise InputError(f"{folder} has {len(files)} GGUF files, where one is exported: export it again.")
    file = files[0]
    try:
        reader = GGUFReader(file)
        arch = _architecture(reader)
        sizes = {key: _number(reader, arch, key) for key in _KEYS}
        sizes |= {key: _number(reader, arch, key) for key in _EXPERTS if reader.get_field(_key(arch, key))}
        found = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    except (ValueError, KeyError, IndexError, TypeError, OSError, OverflowError, MemoryError) as error:
        what = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(f"{file} is not a whole GGUF file ({what}): copy or export it again.") from error
    expected = _expected(arch, sizes)
    if is_tied(folder):
        expected.pop("output.weight", None)
    for name, shape in expected.items():
        if name not in found:
            raise InputError(f"{file} has no tensor {name}: copy or export it again.")
        if found[name] != shape:
            raise InputError(
                f"{file}: tensor {name} has shape {found[name]}, and its metadata ask for {shape}: they do not belong "
                "together, export the model again."
            )
    return file


def _architecture(reader: GGUFReader) -> MODEL_ARCH:
    field = reader.get_field("general.architecture")
    name = field.contents() if field else None
    for arch in {row.arch for row in ARCHITECTURES.values()}:
        if MODEL_ARCH_NAMES[arch] == name:
            return arch
    raise ValueError(f"its architecture is {name}, which is not written here")


def _key(arch: MODEL_ARCH, key: str) -> str:
    return f"{MODEL_ARCH_NAMES[arch]}.{key}"


def _number(reader: GGUFReader, arch: MODEL_ARCH, key: str) -> int:
    field = reader.get_field(_key(arch, key))
    if field is None:
        raise ValueError(f"it does not say {_key(arch, key)}")
    return int(field.contents())


def _expected(arch: MODEL_ARCH, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    t = MODEL_TENSOR
    hidden, ffn, vocabulary = (sizes[key] for key in ("embedding_length", "feed_forward_length", "vocab_size"))
    width, experts = sizes["attention.key_length"], sizes.get("expert_count", 0)
    queries, keys = sizes["attention.head_count"] * width, sizes["attention.head_count_kv"] * width
    norms = (t.ATTN_NORM, t.FFN_NORM, t.ATTN_POST_NORM, t.FFN_POST_NORM, t.OUTPUT_NORM)
    shapes: dict[MODEL_TENSOR, tuple[int, ...]] = {
        t.TOKEN_EMBD: (vocabulary, hidden), t.OUTPUT: (vocabulary, hidden), **dict.fromkeys(norms, (hidden,)),
        t.ATTN_OUT: (hidden, queries), t.ATTN_Q_NORM: (width,), t.ATTN_K_NORM: (width,),
    }  # fmt: skip
    if arch == MODEL_ARCH.OLMOE:  # a norm over all heads
        shapes |= {t.ATTN_Q_NORM: (queries,), t.ATTN_K_NORM: (keys,)}
    if shared := sizes.get("expert_shared_feed_forward_length"):
        shapes |= {t.FFN_GATE_INP_SHEXP: (hidden,), t.FFN_DOWN_SHEXP: (hidden, shared)}
        shapes |= dict.fromkeys((t.FFN_GATE_SHEXP, t.FFN_UP_SHEXP), (shared, hidden))
    if arch == MODEL_ARCH.PHI3:
        shapes[t.ATTN_QKV] = (queries + 2 * keys, hidden)
    else:
        shapes |= {t.ATTN_Q: (queries, hidden), t.ATTN_K: (keys, hidden), t.ATTN_V: (keys, hidden)}
    if experts:
        f = sizes.get("expert_feed_forward_length", ffn)
        inner = (experts, f, hidden)
        shapes |= {t.FFN_GATE_INP: (experts, hidden), t.FFN_GATE_EXP: inner, t.FFN_UP_EXP: inner}
        shapes[t.FFN_DOWN_EXP] = (experts, hidden, f)
    else:
        up = 2 * ffn if arch == MODEL_ARCH.PHI3 else ffn
        shapes |= {t.FFN_GATE: (ffn, hidden), t.FFN_UP: (up, hidden), t.FFN_DOWN: (hidden, ffn)}
    expected: dict[str, tuple[int, ...]] = {}
    for tensor in MODEL_TENSORS[arch]:
        if tensor in shapes:  # the others are optional
            name = f"{TENSOR_NAMES[tensor]}.weight"
            blocks = range(sizes["block_count"]) if "{bid}" in name else range(1)
            expected |= {name.format(bid=index): shapes[tensor] for index in blocks}
    return expected


def is_stock(folder: Path) -> bool:
    """Whether transformers reads the file: it has no reader for some architectures and types, which `read` is for."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        types = {tensor.tensor_type for file in folder.glob("*.gguf") for tensor in GGUFReader(file).tensors}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return True  # what is damaged is named where it is read
    return Q2_0 not in types and (kind not in ARCHITECTURES or ARCHITECTURES[kind].stock)


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `gguf.permute`: (heads * d, ...) from llama.cpp's order to transformers'."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def _floats(data: Array, kind: GGMLQuantizationType) -> Array:
    found: Array = from_q2_0(data) if kind == Q2_0 else dequantize(data, kind)
    return found


def read(folder: Path) -> nn.Module:
    """The stock transformers model of config.json with the weights of the file, unpacked to float32.

    Raises:
        InputError: the file is damaged, or contradicts config.json.
    """
    file = inspect(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        whole = AutoConfig.for_model(**config)
        f, s, row = family_for(whole, str(folder)), Shape.of(whole), ARCHITECTURES[config["model_type"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(f"{folder / 'config.json'} is of no model ({what}): export it again.") from error
    names = get_tensor_name_map(row.arch, s.blocks)
    found = {t.name: torch.from_numpy(_floats(t.data, t.tensor_type).copy()) for t in GGUFReader(file).tensors}
    heads = {f.query: s.query_heads, f.key: s.key_heads} if f.model_type in NEIGHBOURS else {}
    state = {f"{f.embedding}.weight": found["token_embd.weight"]}
    state[f"{f.final_norm}.weight"] = found["output_norm.weight"] - f.norm_offset
    if "output.weight" in found:
        state[f"{f.head}.weight"] = found["output.weight"]
    norms = [norm for norm in norms_of(f) if norm]
    parts = dict.fromkeys([*norms, *(stored_in(f, name) for name in f.projections), *f.weighing])
    for index in range(s.blocks):
        block: dict[str, Tensor] = {}
        for part in parts:
            for last in ("weight", "bias"):
                tensor = found.get(f"{name_in(names, f, index, part)}.{last}")
                if tensor is not None:
                    tensor = unpermute(tensor, heads[part]) if part in heads else tensor
                    tensor = tensor[None] if part == f.shared_gate else tensor
                    block[f"{part}.{last}"] = tensor - f.norm_offset if part in norms else tensor
        if f.experts:  # transformers has gate and up in one tensor
            gate, up, down = (block.pop(f"{f.experts}.{name}.weight") for name in ("gate_proj", "up_proj", "down_proj"))
            block |= {f"{f.experts}.gate_up_proj": torch.cat([gate, up], 1), f"{f.experts}.down_proj": down}
        state |= {f"{f.layers}.{index}.{name}": tensor for name, tensor in block.items()}
    return stock_model(folder, config, state)
