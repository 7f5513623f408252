"""Which of GGUF's types each tensor of a run is written in, and what none of them holds."""

from __future__ import annotations

import re

from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

from ...boa.scheme import QuantizationArgs
from ...errors import InputError
from ...models.families import Family
from ..finished import Finished
from ..scheme_layers import by_weights
from .gguf_blocks import TYPES, block_of
from .k_blocks import NAMES

FILE_TYPES = {"Q2_0": 41} | {f"Q{bits}_K": LlamaFileType[f"MOSTLY_Q{bits}_K_M"] for bits in (3, 4, 5)}
"""What a file is by most of its tensors, where that is not `MOSTLY_` and the type's name in the gguf package."""


def type_of(args: QuantizationArgs, change: str = "quantize with --weights.", layer: str = "") -> Type:
    """The type of a tensor.

    Args:
        args: what its weights have.
        change: how a recipe says other things of it, up to the name of the field.
        layer: whose they are, where it is not the whole model's.

    Raises:
        InputError: there is none for its weights.
    """
    if args.type == "k":
        return NAMES[args.format]
    key = (args.num_bits, args.symmetric)
    if key not in TYPES:
        grid = {True: "symmetric", False: "asymmetric"}
        held = ", ".join(f"{grid[key[1]]} of {key[0]} ({kind.name})" for key, kind in TYPES.items())
        fits = "symmetric" if (args.num_bits, True) in TYPES else "bits 4"
        raise InputError(
            f"GGUF holds these weights exactly: {held} bits; and this run has {grid[args.symmetric]} ones of "
            f"{args.num_bits}{f' in {layer}' if layer else ''}: {change}{fits}, or use --format native."
        )
    kind = TYPES[key]
    if args.group_size and args.group_size % block_of(kind):
        raise InputError(
            f"GGUF's {kind.name} has a scale for {block_of(kind)} weights, and this run one for {args.group_size}"
            f"{f' in {layer}' if layer else ''}: {change}group_size {block_of(kind)} or none, or use --format native."
        )
    return kind


def check_types(run: Finished) -> None:
    """Check that every quantized tensor has a type, and lies in it.

    Raises:
        InputError: one does not.
    """
    f, s, whole = run.family, run.shape, run.spec.scheme.weights
    sites = {"output": ("attention width", s.query_width)}
    for args, layers in by_weights(run, "GGUF", levels=True)[0].items():
        given = () if args == whole else ("override it with weights.", layers[0])
        kind = type_of(args, *given)
        for layer in layers:
            name = layer.removeprefix(f"{f.layers}.").partition(".")[2]
            if f.shared and name == f.shared_down:
                _check_width(kind, "shared expert's ffn size", s.shared_ffn)
            elif f.sites[name] != "down":  # whose width is filled up
                _check_width(kind, *sites.get(f.sites[name], ("hidden size", s.hidden)))
    for end, module in {"embedding": f.embedding, "head": f.head}.items():
        if run.spec.outer(module).quantizes:
            kind = type_of(run.spec.outer(module), f"quantize with --{end}.", f"the {end}")
            _check_width(kind, "hidden size", s.hidden)
    for index in range(s.blocks):
        found: dict[str, QuantizationArgs] = {}
        for name, scheme in run.spec.schemes(f, index).items():
            if found.setdefault(stored_in(f, name), scheme.weights) != scheme.weights:
                raise InputError(
                    f"llama.cpp has all of {stored_in(f, name)} of block {index} in one tensor, of one type, and in "
                    "this run its parts have several: override them alike, or use --format native."
                )


def _check_width(kind: Type, what: str, width: int) -> None:
    if width % block_of(kind):
        raise InputError(
            f"GGUF's {kind.name} packs {block_of(kind)} weights of a row together, and the {what} {width} is no "
            "multiple of it: use --format native."
        )


def stored_in(family: Family, part: str) -> str:
    """The layer of a block that a projection is stored in: of experts all in one, of merged ones their layer."""
    for merged in family.merged:
        if part.startswith(f"{merged.name}."):
            return merged.name
    return re.sub(rf"^({re.escape(family.experts)})\.\d+\.", r"\1.", part) if family.experts else part


def padded_ffn(run: Finished) -> int:
    """The feed-forward width in the file: what the types of all down projections pack."""
    down = next(name for name, site in run.family.sites.items() if site == "down")
    found = [run.spec.schemes(run.family, index)[down].weights for index in range(run.shape.blocks)]
    block = max((block_of(type_of(args)) for args in found if args.quantizes), default=1)
    return -(-run.shape.ffn // block) * block


def file_kind(run: Finished) -> Type:
    """The type of most layers, by which the file is called."""
    return type_of(next(iter(by_weights(run, "GGUF", levels=True)[0])))


def file_type(kind: Type) -> int:
    """The number that says so in the file."""
    return int(FILE_TYPES.get(kind.name) or LlamaFileType[f"MOSTLY_{kind.name}"])


def file_name(kind: Type) -> str:
    """The file in the export's folder."""
    return f"model-{kind.name}.gguf"
