"""Which layer has which scheme, where they are not all alike: of a plan, and of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...boa.scheme import QuantizationArgs, QuantizationScheme
from ...export.finished import Finished
from ...export.spec import Spec
from ...models.families import Family
from ..console.progress import short_layer
from ..recipe.layers import choice_args, whole_scheme
from ..recipe.recipe import Recipe
from ..storage.manifest import BudgetEntry, Manifest
from ..storage.run_folder import RunFolder, recipe_of

Layers = Iterable[tuple[int, str, QuantizationScheme]]
"""Of each layer its block, its name inside the block, and its scheme."""


def planned_schemes(recipe: Recipe, spec: Spec, family: Family, blocks: int, *, tied: bool) -> dict[str, Any] | None:
    """Those of a plan; None where all layers are alike, and embedding and head stay as they are.

    Args:
        recipe: whose budget, if it has one, chooses the bits of what no override names.
        spec: of the run.
        family: of its model.
        blocks: how many it has.
        tied: the head is the embedding.
    """
    weights = recipe.weights
    budgeted = weights.budget is not None or weights.size is not None
    return _shown(_layers(spec, family, blocks), spec, family, tied, weights.choices if budgeted else ())


def schemes_of_run(run: Path, manifest: Manifest) -> dict[str, Any] | None:
    """Those of a run, as of `planned_schemes`; before its model is written those that its budget chose.

    Raises:
        InputError: its model or its recipe cannot be read.
    """
    if (run / "model" / "config.json").is_file():
        folder = RunFolder(run, manifest)
        found = Finished.open(run / "model", [folder.block_path(index) for index in range(len(manifest.blocks))])
        tied = found.spec.tied_head or bool(found.config.get("tie_word_embeddings"))
        return _shown(_layers(found.spec, found.family, found.shape.blocks), found.spec, found.family, tied)
    if manifest.budget is None:
        return None
    recipe = recipe_of(run)
    return {"layers": _groups(_budgeted(manifest.budget, whole_scheme(recipe), choice_args(recipe)))}


def _layers(spec: Spec, family: Family, blocks: int) -> Layers:
    for index in range(blocks):
        for name, scheme in spec.schemes(family, index).items():
            yield index, name, scheme


def _budgeted(budget: BudgetEntry, whole: QuantizationScheme, choices: Mapping[int, QuantizationArgs]) -> Layers:
    for unit in budget.units:
        for name in unit.layers:
            yield unit.block, name, replace(whole, weights=choices[unit.bits])


def _shown(
    layers: Layers, spec: Spec, family: Family, tied: bool, choices: Sequence[int | str] = ()
) -> dict[str, Any] | None:
    groups = _groups(layers, spec.scheme if choices else None, choices)
    embedding, head = (spec.outer(module) for module in (family.embedding, family.head))
    if len(groups) == 1 and not choices and not embedding.quantizes and not head.quantizes:
        return None
    head_scheme = None if tied else _named(QuantizationScheme(head))
    return {"layers": groups, "embedding": _named(QuantizationScheme(embedding)), "head": head_scheme}


def _groups(
    layers: Layers, free: QuantizationScheme | None = None, choices: Sequence[int | str] = ()
) -> list[dict[str, Any]]:
    """A group for each distinct scheme, the largest first: its name, how many layers, and blocks by kind of layer.

    Args:
        layers: all of them; experts of a kind count as one kind.
        free: the scheme of the whole model, where a budget chooses the bits of those whose weights have it.
        choices: the bits it chooses from.
    """
    found: dict[tuple[QuantizationScheme, bool], list[tuple[int, str]]] = {}
    every: Counter[tuple[int, str]] = Counter()
    for block, name, scheme in layers:
        at = block, short_layer(name)
        every[at] += 1
        is_free = free is not None and scheme.weights == free.weights
        found.setdefault((_plain(scheme), is_free), []).append(at)
    groups = []
    for (scheme, is_free), places in found.items():
        kinds: dict[str, list[int]] = {}
        for (block, kind), count in Counter(places).items():
            part = "" if count == every[block, kind] else "some "
            kinds.setdefault(part + kind, []).append(block)
        named = _named(scheme, choices if is_free else ())
        groups.append({**named, "count": len(places), "blocks": kinds})
    return sorted(groups, key=lambda group: -int(group["count"]))


def _plain(scheme: QuantizationScheme) -> QuantizationScheme:
    """Without groups and symmetry of what is not quantized."""
    parts = (scheme.weights, scheme.input_activations)
    return QuantizationScheme(*(part if part.quantizes else QuantizationArgs() for part in parts))


def _named(scheme: QuantizationScheme, choices: Sequence[int | str] = ()) -> Mapping[str, Any]:
    """A scheme in a word or two, and as plain data; with `choices` its bits are one of them."""
    name, data = scheme.shown, scheme.to_dict()
    if choices:
        name = name.replace(f"W{scheme.weights.num_bits}A", f"W{'/'.join(map(str, choices))}A") + ", by the budget"
        data["weights"] |= {"num_bits": None, "choices": list(choices)}
    if scheme.weights.quantizes and scheme.weights.symmetric:
        name += ", symmetric"
    inputs = scheme.input_activations
    if inputs.quantizes:
        name += f", inputs in groups of {inputs.group_size}" if inputs.group_size else ""
        name += "" if inputs.symmetric else ", inputs with a zero point"
    return {"scheme": name, **data}
