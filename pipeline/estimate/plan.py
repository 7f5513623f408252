"""The plan of a run, before any work: sizes, rotations, memory and time, from config and headers of files alone.

Operations are counted (`counting`), and a second of products and copies says what this machine makes of them; factors
by stage, from runs of the embedded model, say how much longer a run takes than that. Memory is the sum of what is held
at once where most is (`footprint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...boa.online.attention import NAME
from ...boa.online.served_cache import OWN
from ...errors import InputError
from ...export.finished import numbers_in_blocks
from ...export.spec import Spec
from ...export.stored_sizes import projection_bytes, stored_bytes
from ...models.aliases import resolve_model
from ...models.checkpoint import Checkpoint
from ...models.decoder import Decoder
from ...models.families import has_row
from ...models.hub import fetch
from ...models.remote import Remote
from ...models.shape import Shape
from ...rotation import hadamard_matrices
from ...rotation.hadamard import Hadamard
from ...rotation.rotate import Rotations
from ..console.human import human_size
from ..console.sizes import bits_of_file, parameter_count, part_sizes, was_tied
from ..job.checks import bos_of, check_sizes, length_of
from ..job.notices import early_notices
from ..recipe.recipe import Recipe
from ..recipe.settings import changed_outer_layers, rotations_of, serving, spec_of, stays_tied
from ..storage.buffers import free_memory
from ..storage.run_folder import device_of
from .budgets import budgeted_files
from .counting import whole
from .direction_costs import direction_costs
from .footprint import PROCESS, activation_bytes, footprint, spilled_bytes
from .machines import calibrated, measured
from .schemes import planned_schemes
from .workload import Plan, Sizes

TIME, MEMORY = 2.0, 1.25
"""Within these factors the estimates were of what runs on a processor took; a test holds a small one to them."""


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
    if not has_row(checkpoint.config):
        raise InputError(
            f"{model.name} is a '{checkpoint.config.model_type}' model, which has no row of its own, and what a run "
            "of it takes is not estimated: start the run."
        )
    decoder = Decoder(checkpoint.config, attention=NAME, device=target)
    checkpoint.check(decoder.shapes)
    check_sizes(recipe, decoder, model)
    shape, length = decoder.shape, length_of(recipe, model, decoder)
    windows = recipe.evaluation.windows or model.windows
    tokens = recipe.calibration.samples * length
    itemsize = checkpoint.dtype.itemsize
    rotations = rotations_of(recipe, decoder)
    tied, changed = stays_tied(recipe, rotations, decoder), changed_outer_layers(recipe, rotations, decoder)
    spec = spec_of(recipe, rotations, decoder)
    schemes = planned_schemes(recipe, spec, decoder.family, shape.blocks, tied=tied)
    quantized = numbers_in_blocks(decoder.family, shape)
    sizes = _sizes(spec, decoder, quantized, itemsize, tied)
    directions = direction_costs(spec, decoder.family, shape)
    counted, run = replace(Sizes.of(decoder), tied=tied), Plan.of(recipe, length, windows)
    beside: dict[str, Any] = {"parallel": decoder.family.parallel, "mixed": counted.mixed}
    activations = activation_bytes(shape, tokens, recipe.weights.method, **beside)
    budget = free_memory() // 2 if recipe.memory is None else int(recipe.memory)
    files = budgeted_files(recipe, spec, decoder, itemsize, tied=tied)
    return {
        "model": {
            "name": model.name,
            "architecture": decoder.family.model_type,
            "parameters": parameter_count(decoder),
            "quantized_parameters": quantized,
            "blocks": shape.blocks,
            "hidden": shape.hidden,
            "ffn": shape.ffn,
            "query_heads": shape.query_heads,
            "key_heads": shape.key_heads,
            "head_dim": shape.head_dim,
            "vocabulary": shape.vocabulary,
            "dtype": str(checkpoint.dtype).removeprefix("torch."),
        },
        "rotations": _rotations(recipe, rotations, shape),
        **({} if directions is None else {"directions": directions}),
        **({} if schemes is None else {"schemes": schemes}),
        "sizes": {"original": checkpoint.bytes, **sizes},
        "calibration": {
            "sequences": recipe.calibration.samples,
            "sequence_length": length,
            "bos": bos_of(recipe, decoder),
            "tokens": tokens,
            "evaluation_windows": windows,
            **activations,
            "memory": budget,
            "spilled": spilled_bytes(shape, sum(activations.values()), budget, itemsize, changed),
        },
        "memory": _memory(counted, run, min(sum(activations.values()), budget), itemsize, target),
        "time": _time(counted, run, target),
        **({} if files is None else {"budget": files}),
        "notices": [*_of_budget(files), *checkpoint.notices(decoder.shapes), *early_notices(recipe, decoder, length)],
    }


def _of_budget(files: Mapping[str, int] | None) -> list[str]:
    """A sentence where the bits of layers are not known yet."""
    if files is None:
        return []
    least, most = (human_size(files[end]) for end in ("least", "most"))
    return [
        "The bits of each layer are found by measurement, before it is quantized, which takes longer than is said "
        f"here: the file will take {least} to {most}, in place of the size above."
    ]


def _time(sizes: Sizes, run: Plan, device: torch.device) -> dict[str, Any]:
    """Operations and seconds by stage."""
    machine = replace(measured(device), factors=calibrated())
    stages = {
        name: {"operations": work.operations, "seconds": machine.seconds(work, name)}
        for name, work in whole(sizes, run).items()
    }
    return {
        "device": str(device),
        "disturbed": list(machine.disturbed),
        "rates": machine.rates,
        "stages": stages,
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "within": TIME,
    }


def _memory(sizes: Sizes, run: Plan, held: float, itemsize: int, device: torch.device) -> dict[str, float]:
    """Bytes held where most is, by stage, and the most of them; on a GPU those of the device apart from the host's."""
    parts = footprint(sizes, run, itemsize)
    host = PROCESS + held
    stages = {name: getattr(parts, name) for name in ("rotation", "forward", "solver", "evaluation")}
    if device.type == "cpu":
        stages = {name: host + size for name, size in stages.items()}
        return {**stages, "peak": host + parts.peak}
    stages["rotation"] += host
    return {**stages, "device": parts.device, "peak": stages["rotation"]}


def construction(rotation: Hadamard) -> str:
    """How its matrix is made, in words."""
    parts = [hadamard_matrices.construction(rotation.base)] if rotation.base > 1 else []
    doubled = rotation.order // rotation.base
    if doubled > 1 or not parts:
        parts.append(f"Sylvester of order {doubled}")
    text = " x ".join(parts)
    return text if rotation.blocks == 1 else f"{rotation.blocks} blocks, each {text}"


def _rotations(recipe: Recipe, rotations: Rotations, shape: Shape) -> dict[str, dict[str, Any]]:
    where = "inputs of q, k, v, gate and up, online" if rotations.online_r1 else "residual stream, folded"
    places = {
        "r1": (rotations.r1 is not None, shape.hidden, where),
        "r2": (recipe.rotation.r2, shape.head_dim, "values of each head, folded"),
        "r3": (recipe.rotation.r3 and serving(recipe) == OWN, shape.head_dim, "queries and keys, online"),
        "heads": (recipe.rotation.heads, shape.query_width, "input of O, over all heads, online"),
        "r4": (recipe.rotation.r4, shape.ffn, "input of down, online"),
    }
    found = {}
    for name, (wanted, size, place) in places.items():
        if wanted:
            block = recipe.rotation.blocks if name in ("r1", "r2", "r4") else None
            rotation = Hadamard.of(size, powers=name == "r4" and recipe.rotation.r4_blocks, block=block)
            if name == "heads":
                rotation = Hadamard.across(shape.query_heads, shape.head_dim)
            found[name] = {
                "where": place,
                "size": size,
                "order": rotation.order,
                "blocks": rotation.blocks,
                "base": rotation.base,
                "construction": construction(rotation),
            }
    return found


def _sizes(spec: Spec, decoder: Decoder, weights: int, itemsize: int, tied: bool) -> dict[str, Any]:
    """Bytes of the exported tensors by part, and the bits of each of `weights`, scales and zero points included."""
    stored = stored_bytes(decoder, spec, itemsize, tied=tied)
    return {
        "quantized": sum(stored.values()),
        **part_sizes(stored, decoder),
        "was_tied": was_tied(decoder),
        "bits_per_weight": 8 * sum(projection_bytes(decoder, spec, itemsize).values()) / weights,
        "bits_per_weight_of_file": bits_of_file(stored, decoder),
    }
