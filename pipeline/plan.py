"""The plan of a run, before any work: sizes, rotations, memory and time, from config and headers of files alone.

Operations are counted, and a short matrix product says how many this machine does in a second. Memory is the sum of
what is held at once where most is: in the solver of the widest layer, or in the evaluation of a large vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..boa.attention import NAME
from ..boa.block_output import TOKENS
from ..export.packing import packed_width
from ..models.aliases import resolve_model
from ..models.checkpoint import Checkpoint, fetch
from ..models.decoder import Decoder
from ..models.families import Shape
from ..models.remote import Remote
from ..rotation.hadamard import Hadamard, _prime_power, base_matrix
from .buffers import free_memory
from .job import activation_bytes, check_sizes, length_of
from .recipe import Recipe
from .run import device_of

BASELINE = 500 * 2**20  # bytes of the process before it has done anything: Python, torch, transformers
EFFICIENCY = 0.4  # of the rate of a large matrix product that a run reaches over all: a rough estimate

ATTENTION = ("boa", "aespa", "brecq")  # methods whose objective of the values needs A


@dataclass(frozen=True)
class Layer:
    """One projection: rows x columns, and how many heads have an input Hessian of their own."""

    name: str
    rows: int
    columns: int
    hessians: int = 1


def plan(recipe: Recipe, device: str | None = None) -> dict[str, Any]:
    """The plan of a recipe as plain data; bytes, seconds and operations in units of one.

    Of a hub model that is not in the local cache only config.json and the headers of its files are fetched.

    Raises:
        InputError: the model cannot be read, is not supported, or does not fit the recipe.
    """
    target = device_of(device)
    model = resolve_model(recipe.model)
    source = Remote.of(model.source) if not model.is_local else None
    checkpoint = source or Checkpoint(fetch(model.source, model.is_local))
    decoder = Decoder(checkpoint.config, attention=NAME, device=target)
    checkpoint.check(decoder.shapes)
    check_sizes(recipe, decoder, model)
    shape, length = decoder.shape, length_of(recipe, model, decoder)
    windows = recipe.evaluation.windows or model.windows
    tokens = recipe.calibration.samples * length
    itemsize = checkpoint.dtype.itemsize
    projections = {
        name: tensor
        for name, tensor in decoder.shapes.items()
        if name.removesuffix(".weight").endswith(decoder.family.projections) and len(tensor) == 2
    }
    sizes = _sizes(recipe, decoder, projections, itemsize)
    layers = list(_layers(shape, recipe))
    activations = activation_bytes(shape, tokens, recipe.weights.method)
    budget = free_memory() // 2 if recipe.memory is None else int(recipe.memory)
    operations = _operations(recipe, shape, layers, tokens, length)
    evaluated = (3 if recipe.evaluation.baseline else 2) * _forward(shape, length) * (windows or 0) * length
    rate = matrix_rate(target)
    return {
        "model": {
            "name": model.name,
            "architecture": decoder.family.model_type,
            "parameters": sum(tensor.numel() for tensor in decoder.shapes.values()),
            "quantized_parameters": sum(tensor.numel() for tensor in projections.values()),
            "blocks": shape.blocks,
            "hidden": shape.hidden,
            "ffn": shape.ffn,
            "query_heads": shape.query_heads,
            "key_heads": shape.key_heads,
            "head_dim": shape.head_dim,
            "vocabulary": shape.vocabulary,
            "dtype": str(checkpoint.dtype).removeprefix("torch."),
        },
        "rotations": _rotations(recipe, shape),
        "sizes": {"original": checkpoint.bytes, **sizes},
        "calibration": {
            "sequences": recipe.calibration.samples,
            "sequence_length": length,
            "tokens": tokens,
            "evaluation_windows": windows,
            **activations,
            "memory": budget,
            "spilled": max(0, sum(activations.values()) - budget) + 2 * shape.vocabulary * shape.hidden * itemsize,
        },
        "memory": _memory(shape, layers, min(sum(activations.values()), budget), itemsize, recipe),
        "time": {
            "device": str(target),
            "operations": {**operations, "evaluation": evaluated},
            "operations_per_second": rate,
            "seconds": (sum(operations.values()) + evaluated) / (EFFICIENCY * rate),
        },
    }


def construction(rotation: Hadamard) -> str:
    """How its matrix is made, in words."""
    parts, base = [], rotation.base
    while base > 2 and base % 8 == 0 and _is_constructible(base // 2):
        base //= 2
    doubled = rotation.order // base
    if base > 2:
        if (field := _prime_power(base - 1)) and (base - 1) % 4 == 3:
            parts.append(f"Paley I of order {base} over GF({field[0] ** field[1]})")
        elif (field := _prime_power(base // 2 - 1)) and (base // 2 - 1) % 4 == 1:
            parts.append(f"Paley II of order {base} over GF({field[0] ** field[1]})")
        else:
            parts.append(f"Goethals-Seidel of order {base}")
    if doubled > 1 or base <= 2:
        parts.append(f"Sylvester of order {doubled * (base if base <= 2 else 1)}")
    text = " x ".join(parts)
    return text if rotation.blocks == 1 else f"{rotation.blocks} blocks, each {text}"


def _is_constructible(order: int) -> bool:
    try:
        base_matrix(order)
    except ValueError:
        return False
    return True


def matrix_rate(device: torch.device) -> float:
    """Operations in a second of a float32 matrix product, the best of a few short ones."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _rotations(recipe: Recipe, shape: Shape) -> dict[str, dict[str, Any]]:
    places = {
        "r1": (recipe.rotation.r1, shape.hidden, "residual stream, folded"),
        "r2": (recipe.rotation.r2, shape.head_dim, "values of each head, folded"),
        "r3": (recipe.rotation.r3, shape.head_dim, "queries and keys, online"),
        "r4": (recipe.rotation.r4, shape.ffn, "input of down, online"),
    }
    found = {}
    for name, (wanted, size, place) in places.items():
        if wanted:
            rotation = Hadamard.of(size, powers=name == "r4" and recipe.rotation.r4_blocks)
            found[name] = {
                "where": place,
                "size": size,
                "order": rotation.order,
                "blocks": rotation.blocks,
                "base": rotation.base,
                "construction": construction(rotation),
            }
    return found


def _sizes(
    recipe: Recipe, decoder: Decoder, projections: Mapping[str, torch.Size], itemsize: int
) -> dict[str, int | float]:
    """Bytes of the exported tensors, and the bits that a quantized weight takes, scales and zero points included."""
    packed = weights = 0
    for rows, columns in projections.values():
        groups = columns // (recipe.weights.group_size or columns)
        packed += rows * (4 * packed_width(columns, recipe.weights.bits) + 3 * groups)
        weights += rows * columns
    others = sum(tensor.numel() for name, tensor in decoder.shapes.items() if name not in projections)
    if f"{decoder.family.head}.weight" not in decoder.shapes:
        others += decoder.shape.vocabulary * decoder.shape.hidden  # tied: the two are rotated differently
    return {"quantized": packed + others * itemsize, "bits_per_weight": 8 * packed / weights}


def _layers(shape: Shape, recipe: Recipe) -> Iterator[Layer]:
    """What is solved in one block."""
    query, key = shape.query_heads * shape.head_dim, shape.key_heads * shape.head_dim
    yield Layer("query and key", query + key, shape.hidden)
    yield Layer("value", key, shape.hidden, shape.key_heads if recipe.weights.method in ATTENTION else 1)
    yield Layer("output", shape.hidden, query)
    yield Layer("gate and up", 2 * shape.ffn, shape.hidden)
    yield Layer("down", shape.hidden, shape.ffn)


def _forward(shape: Shape, length: int) -> int:
    """Operations of one token in a forward pass over all blocks; half of the attention matrix is computed."""
    query, key = shape.query_heads * shape.head_dim, shape.key_heads * shape.head_dim
    weights = shape.hidden * (2 * query + 2 * key + 3 * shape.ffn)
    return shape.blocks * (2 * weights + 2 * length * query)


def _operations(recipe: Recipe, shape: Shape, layers: list[Layer], tokens: int, length: int) -> dict[str, int]:
    """Operations by stage; those in float64 count twice."""
    settings = recipe.weights
    statistics = solving = 0
    for layer in layers:
        c, r = layer.columns, layer.rows
        statistics += tokens * (c * c * layer.hessians + 2 * min(r, c) * c)
        if settings.method != "rtn":
            solving += 2 * layer.hessians * 5 * c**3 // 3  # three Cholesky factors and an inverse
            solving += settings.starts * r * c * c * (1 + 2 * settings.refine) + 4 * r * c * c
        if settings.method in ("adaround", "aespa"):
            solving += settings.iterations * 2 * r * c * (c + 16)  # some 16 operations on each weight of a step
    if settings.method in ATTENTION:
        heads, groups, hidden = shape.query_heads, shape.key_heads, shape.hidden
        direct = 2 * heads * (length * length * hidden + length * hidden * hidden)
        grouped = 2 * (heads * length**3 + groups * (length * length * hidden + length * hidden * hidden))
        statistics += tokens // length * min(direct, grouped)
    if settings.method == "brecq":  # a step is a forward and a backward pass
        step = max(length, TOKENS) * 3 * _forward(shape, length) // shape.blocks
        solving += settings.iterations * min(step, tokens * 3 * _forward(shape, length) // shape.blocks)
    return {
        "forward passes": 4 * tokens * _forward(shape, length),  # plain, full precision, and quantized nearly twice
        "statistics": shape.blocks * statistics,
        "solving": shape.blocks * solving,
    }


def _memory(shape: Shape, layers: list[Layer], held: int, itemsize: int, recipe: Recipe) -> dict[str, int]:
    """Bytes held where most is, by stage, and the most of them."""
    block = 4 * shape.hidden * (2 * (shape.query_heads + shape.key_heads) * shape.head_dim + 3 * shape.ffn)

    def solver(layer: Layer) -> int:
        # float32: Hessian, its parts, factor; float64: damped, and two copies while it is factored.
        square = layer.hessians * layer.columns**2 * (3 * 4 + 3 * 8)
        many = max(recipe.weights.starts - 1, 1)
        return square + layer.rows * layer.columns * 4 * (4 + 3 * many)

    ends = shape.vocabulary * shape.hidden
    stages = {
        "rotation of a block": BASELINE + held + 4 * block,
        "solver": BASELINE + held + 2 * block + max(map(solver, layers)),
        "evaluation": BASELINE + 2 * block + ends * (2 * 4 + 2 * itemsize),
    }
    return {**stages, "peak": max(stages.values())}
