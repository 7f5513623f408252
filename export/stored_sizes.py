"""Bytes that a native checkpoint will take, counted from config and spec before there is one."""

from __future__ import annotations

import math

from ..boa.online.attention import CENTER
from ..models.decoder import Decoder
from ..models.layout import given_biases
from ..models.outer_layers import TURN
from .finished import projection_columns, projection_rows
from .packing import packed_bytes
from .spec import Spec


def projection_bytes(decoder: Decoder, spec: Spec, itemsize: int) -> dict[str, int]:
    """Of each projection of all blocks, by its full name; `itemsize` is that of the checkpoint's dtype."""
    family, shape = decoder.family, decoder.shape
    found = {}
    for index in range(shape.blocks):
        rows, columns = projection_rows(family, shape, index), projection_columns(family, shape, index)
        for name, scheme in spec.schemes(family, index).items():
            size = packed_bytes(rows[name], columns[name], scheme.weights, itemsize)
            found[f"{family.layers}.{index}.{name}"] = size
    return found


def stored_bytes(decoder: Decoder, spec: Spec, itemsize: int, *, tied: bool) -> dict[str, int]:
    """Of all weights, by the names that they have in full precision; `tied`: there is no head of its own."""
    f, shape = decoder.family, decoder.shape
    # Which are there as their parts.
    merged = tuple(f".{merged.name}.weight" for kind in f.all_kinds for merged in kind.merged)
    stored = {
        name: size.numel() * (4 if name.endswith(f.exact) else itemsize)
        for name, size in decoder.shapes.items()
        if not name.endswith(merged)
    }
    stored |= {f"{name}.weight": size for name, size in projection_bytes(decoder, spec, itemsize).items()}
    for index in range(shape.blocks):
        kept = [name for name in f.at(index).kept if name in (f.sizes or {})]  # parts of those that are no projections
        stored |= {f"{f.layers}.{index}.{name}.weight": math.prod((f.sizes or {})[name]) * itemsize for name in kept}
    for module in (f.embedding, f.head):
        rows, columns = decoder.shapes[f"{module}.weight"]
        stored[f"{module}.weight"] = packed_bytes(rows, columns, spec.outer(module), itemsize)
    for index in range(shape.blocks):
        stored |= {f"{f.layers}.{index}.{name}": size * itemsize for name, size in _found(decoder, spec, index).items()}
    if f.embedding_norm is not None:
        stored = {name: size for name, size in stored.items() if not name.startswith(f"{f.embedding_norm}.")}
    if f.layer_norm:
        stored |= _given_biases(decoder, itemsize)
    if spec.turned and f.layer_norm:  # biases of norms are folded, that of the last into the head
        folded = tuple(f"{norm}.bias" for norm in (*f.norm_readers, f.final_norm))
        stored = {name: size for name, size in stored.items() if not name.endswith(folded)}
        stored[f"{f.head}.bias"] = shape.vocabulary * itemsize
    if tied:  # the model names it twice
        del stored[f"{f.head}.weight"]
    if spec.turns_head:
        stored[f"{f.head}.{TURN}"] = shape.hidden**2 * itemsize
    return stored


def _found(decoder: Decoder, spec: Spec, index: int) -> dict[str, int]:
    """Numbers of what calibration finds for the quantizers of a block, by the names of tensors inside it."""
    family, shape = decoder.family.at(index), decoder.shape.at(index)
    transforms = spec.transforms(decoder.shape, decoder.family, index)
    center = {f"{family.attention}.{CENTER}": shape.key_width} if transforms.attention.centered else {}
    return {name: scale.numel() for name, scale in transforms.scales(family).items()} | center


def _given_biases(decoder: Decoder, itemsize: int) -> dict[str, int]:
    """Of the biases that a model has not, and its blocks and its last norm are given: see `layout.split_modules`."""
    f, shape, found = decoder.family, decoder.shape, dict[str, int]()
    names = set(decoder.shapes)
    for index in range(shape.blocks):
        prefix = f"{f.layers}.{index}."
        inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        inside |= {f"{m.name}.{part}.bias" for m in f.merged for part in m.parts if f"{m.name}.bias" in inside}
        given = given_biases(inside, f, shape)
        found |= {f"{prefix}{name}.bias": size * itemsize for name, size in given.items()}
    if f"{f.final_norm}.bias" not in names:
        found[f"{f.final_norm}.bias"] = shape.hidden * itemsize
    return found
