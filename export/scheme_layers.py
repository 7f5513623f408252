"""Which layers have which scheme: in short words, and as patterns on their names, which readers of formats take."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from ..boa.scheme import GROUPS, TWO_LEVELS, QuantizationArgs, QuantizationScheme
from ..errors import InputError
from ..models.families import Family
from .finished import Finished

_FUSED = ("qkv", "gate_up")  # the sites whose projections vLLM computes as one layer, named qkv_proj and gate_up_proj


@dataclass(frozen=True)
class SchemeLayers:
    """A scheme, and how many layers have it and which, in words."""

    scheme: QuantizationScheme
    count: int
    which: str


def by_scheme(run: Finished) -> dict[QuantizationScheme, list[str]]:
    """Full names of the projections of all blocks by what they have: the scheme of the whole model first, where any has
    it, then the most frequent. Groups and symmetry of what is in 16 bits are left out, so that it is one scheme.
    """
    found: dict[QuantizationScheme, list[str]] = {}
    for index in range(run.shape.blocks):
        for name, scheme in run.spec.schemes(run.family, index).items():
            found.setdefault(_effective(scheme), []).append(f"{run.family.layers}.{index}.{name}")
    whole = _effective(run.spec.scheme)
    return dict(sorted(found.items(), key=lambda item: (item[0] != whole, -len(item[1]))))


def by_weights(
    run: Finished, name: str, *, floats: bool = False, levels: bool = False
) -> tuple[dict[QuantizationArgs, list[str]], list[str]]:
    """Of `by_scheme`, what the weights have, and the layers whose weights are in 16 bits; `name` is of the format.

    Raises:
        InputError: these are all, or some are floating point or have scales of two levels, where the format has no
            `floats` or `levels`.
    """
    refuse_others(run, name, *(() if floats else GROUPS), *(() if levels else TWO_LEVELS))
    found: dict[QuantizationArgs, list[str]] = {}
    for scheme, layers in by_scheme(run).items():
        found.setdefault(scheme.weights, []).extend(layers)
    full = found.pop(QuantizationArgs(), [])
    if not found:
        raise InputError(f"all layers of this run have 16-bit weights, so there is nothing to write in {name}.")
    return found, full


def patterns(names: Iterable[str], run: Finished, *, fused: bool = False) -> list[str]:
    r"""Regular expressions that match these layers and no other, each from the start of a name.

    Example: `.*model\.layers\.(0|29)\.(mlp\.down_proj)$`.

    Args:
        names: full names of projections.
        run: the run that they are of.
        fused: the names that vLLM gives to projections of one input match too, where all of these are among `names`.
    """
    found = []
    for blocks, inside in _by_blocks(names, run.family):
        if fused:
            inside += [whole for whole, parts in fused_layers(run.family).items() if set(parts) <= set(inside)]
        where = r"\d+" if len(blocks) == run.shape.blocks else f"({'|'.join(map(str, blocks))})"
        found.append(rf".*{re.escape(run.family.layers)}\.{where}\.({'|'.join(map(re.escape, inside))})$")
    return found


def fused_layers(family: Family) -> dict[str, tuple[str, ...]]:
    """The names inside a block of what vLLM computes as one layer, and of the projections it is made of."""
    found: dict[str, tuple[str, ...]] = {}
    for site in () if family.generic else _FUSED:
        parts = tuple(name for name, where in family.sites.items() if where == site)
        found[f"{parts[0].rpartition('.')[0]}.{site}_proj"] = parts
    return found


def divided(run: Finished) -> str:
    """The first of vLLM's fused layers whose projections have different schemes, in words; empty where none is."""
    for index in range(run.shape.blocks):
        schemes = run.spec.schemes(run.family, index)
        for parts in fused_layers(run.family.at(index)).values():
            if len({_effective(schemes[name]) for name in parts}) > 1:
                return f"{', '.join(dict.fromkeys(name.rpartition('.')[2] for name in parts))} of block {index}"
    return ""


def scheme_layers(run: Finished) -> list[SchemeLayers]:
    """A row for each scheme of the projections, then embedding and head where these are quantized."""
    rows = [SchemeLayers(scheme, len(names), _in_words(names, run)) for scheme, names in by_scheme(run).items()]
    called = {run.family.embedding: "embedding", run.family.head: "head"}
    return rows + [
        SchemeLayers(QuantizationScheme(args), 1, called[module]) for module, args in quantized_ends(run).items()
    ]


def quantized_ends(run: Finished) -> dict[str, QuantizationArgs]:
    """What the weights of embedding and head have, by their full names, where they are quantized; a tied head is not
    named.
    """
    ends = {module: run.spec.outer(module) for module in (run.family.embedding, run.family.head)}
    return {module: args for module, args in ends.items() if args.quantizes}


def refuse_ends(run: Finished, name: str, *, head: bool = False) -> None:
    """Refuse a run with a quantized embedding or head, in a format that has them in full precision; with `head` it
    holds a quantized head.

    Raises:
        InputError: one is.
    """
    called = {run.family.embedding: "embedding", run.family.head: "head"}
    for module, args in quantized_ends(run).items():
        if not (head and module == run.family.head):
            raise InputError(
                f"{name} is written with the {called[module]} in 16 bits, and this run has it in {args.num_bits}: use "
                f"--format native, or quantize with --{called[module]}.bits 16."
            )


def refuse_others(run: Finished, name: str, *others: str) -> None:
    """Refuse a run with weights in one of these formats of numbers.

    Raises:
        InputError: there are some.
    """
    for scheme in (run.spec.scheme, *run.spec.layers.values()):
        found = scheme.weights.format
        if found in others:
            fits = "gguf" if found in TWO_LEVELS else "compressed-tensors"
            raise InputError(
                f"{name} is not written with weights in {found}, which this run has: use --format {fits}, or native."
            )


def _effective(scheme: QuantizationScheme) -> QuantizationScheme:
    parts = (scheme.weights, scheme.input_activations)
    return QuantizationScheme(*(part if part.quantizes else QuantizationArgs() for part in parts))


def _by_blocks(names: Iterable[str], family: Family) -> list[tuple[tuple[int, ...], list[str]]]:
    """Names inside blocks, together where they are in the same ones."""
    blocks: dict[str, list[int]] = {}
    for name in names:
        index, _, inside = name.removeprefix(f"{family.layers}.").partition(".")
        blocks.setdefault(inside, []).append(int(index))
    found: dict[tuple[int, ...], list[str]] = {}
    for inside, where in blocks.items():
        found.setdefault(tuple(sorted(where)), []).append(inside)
    return list(found.items())


def _in_words(names: Iterable[str], run: Finished) -> str:
    """Such as "down_proj; all of blocks 0, 2-4"."""
    names, words = list(names), []
    if len(names) == len(run.family.layer_names(run.shape.blocks)):
        return "all"
    for blocks, inside in _by_blocks(names, run.family):
        whole = len(inside) == len(run.family.at(blocks[0]).projections)
        what = "all" if whole else ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in inside))
        several = "blocks" if len(blocks) > 1 else "block"
        where = "" if len(blocks) == run.shape.blocks else f" of {several} {_spans(blocks)}"
        words.append(what + where)
    return "; ".join(words)


def _spans(numbers: Iterable[int]) -> str:
    """Such as "0, 2-4"."""
    runs = [[n for _, n in part] for _, part in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in runs)
