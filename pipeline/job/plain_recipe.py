"""What of a recipe is carried out on a model without a row: its linear layers are quantized, each by itself."""

from __future__ import annotations

from typing import Any

from ...boa.scheme import FULL
from ...errors import InputError
from ...models.aliases import ResolvedModel
from ...models.families import Family
from ..recipe.recipe import Recipe

_METHODS = {"boa": "gptq", "aespa": "adaround"}
"""Attention is not known, and its objectives are not: what they are without."""
_PLAIN: dict[str, dict[str, Any]] = {
    "rotation": {"r1": "none", "r2": False, "r3": False, "r4": False, "heads": False, "scale": False},
    "activations": {"bits": FULL},
    "cache": {"key_bits": FULL, "value_bits": FULL},
    "embedding": {"bits": FULL},
    "head": {"bits": FULL},
    "weights": {"zfold": ()},
    "evaluation": {"sources": False},
}


def plain_recipe(recipe: Recipe, family: Family, model: ResolvedModel) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe as it is carried out, and a notice of what is left out.

    Raises:
        InputError: what is left would not be what was asked for.
    """
    of = f"{model.name} is a '{family.model_type}' model, which has no row of its own"
    if recipe.weights.method == "brecq":
        raise InputError(f"{of}, and brecq learns blocks that have one: give --weights.method gptq or adaround.")
    if recipe.weights.budget is not None or recipe.weights.size is not None:
        raise InputError(f"{of}, and bits are not chosen by a budget there: give --weights.bits.")
    if any(override.activations.given() for override in recipe.overrides):
        raise InputError(f"{of}, and its activations stay in 16 bits: leave them out of the overrides.")
    method = _METHODS.get(recipe.weights.method, recipe.weights.method)
    changes = {name: dict(fields) for name, fields in _PLAIN.items()}
    changes["weights"]["method"] = method
    left, sections = [], {}
    for name, fields in changes.items():
        section = getattr(recipe, name)
        other = {field: value for field, value in fields.items() if (getattr(section, field) or value) != value}
        left += [f"{name}.{field}" for field in other if field != "method"]
        if other:
            sections[name] = section.model_copy(update=other)
    notice = (
        f"family generic: '{family.model_type}' has no row of its own. The linear layers of its blocks are quantized, "
        f"each by itself ({method}), and all else stays as it is"
    )
    notice += f"; of the recipe this leaves out {', '.join(left)}." if left else "."
    return recipe.model_copy(update=sections), (notice,)
