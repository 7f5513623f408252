"""The fields of Recipe by their dotted names, such as weights.bits, and what is said of them in help and errors.

Legal values are derived from the annotations that validate, so what is said and what is taken cannot drift apart.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from .recipe import Recipe
from .values import Legal


class FieldPath(NamedTuple):
    """One leaf field of Recipe, as a command line needs it."""

    name: str  # dotted, such as weights.bits
    annotation: Any
    default: Any
    description: str


SECTIONS = {
    name: type(info.default) for name, info in Recipe.model_fields.items() if isinstance(info.default, BaseModel)
}


def _leaves() -> dict[str, FieldInfo]:
    leaves: dict[str, FieldInfo] = {}
    for name, info in Recipe.model_fields.items():
        if name in SECTIONS:
            leaves |= {f"{name}.{leaf}": leaf_info for leaf, leaf_info in SECTIONS[name].model_fields.items()}
        else:
            leaves[name] = info
    return leaves


LEAVES = _leaves()
"""The leaf fields by their dotted names."""


def legal_values(info: FieldInfo) -> str:
    """Says in words what a field may be, from its annotation and bounds."""
    options = [part for part in get_args(info.annotation) if part is not NoneType]
    words: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    if get_origin(info.annotation) is Literal:
        text = f"one of {', '.join(options)}"
    elif marks := [mark for mark in info.metadata if isinstance(mark, Legal)]:
        text = marks[0].text
    else:
        text = words[options[0] if options else info.annotation]
    bounds = [
        f"{word} {getattr(mark, key)}"
        for mark in info.metadata
        for key, word in {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}.items()
        if hasattr(mark, key)
    ]
    text = " ".join([text, " and ".join(bounds)]).strip()
    return f"{text}, or none" if NoneType in get_args(info.annotation) else text


def field_paths() -> list[FieldPath]:
    """All leaf fields of Recipe; the description ends with the legal values and the default."""
    paths = []
    for name, info in LEAVES.items():
        shown = "none" if info.default == () else str(info.default)
        default = shown.lower() if isinstance(info.default, bool | NoneType) else shown
        # A flag shows by itself that it is true or false, and the text of a choice explains each of its values.
        kinds = {info.annotation, *get_args(info.annotation)}
        implied = get_origin(info.annotation) is Literal or not kinds.isdisjoint((bool, str, Path, tuple[str, ...]))
        note = f"default {default}" if implied else f"{legal_values(info)}; default {default}"
        paths.append(FieldPath(name, info.annotation, info.default, f"{info.description} ({note})"))
    return paths


def value_of(recipe: Recipe, name: str) -> Any:
    """The value of a leaf field by its dotted name."""
    section, _, leaf = name.rpartition(".")
    return getattr(getattr(recipe, section) if section else recipe, leaf)


def given_fields(recipe: Recipe) -> set[str]:
    """The dotted names of the leaf fields that somebody gave: not those of a packaged recipe, see `build_recipe`."""
    found = recipe.model_fields_set - set(SECTIONS)
    for name in SECTIONS:
        found |= {f"{name}.{leaf}" for leaf in getattr(recipe, name).model_fields_set}
    return found


def forget_given(recipe: Recipe, name: str) -> None:
    """Have a leaf field, by its dotted name, count as one that nobody gave; its value stays."""
    section, _, leaf = name.rpartition(".")
    (getattr(recipe, section) if section else recipe).model_fields_set.discard(leaf)


def kept_recipe(data: Mapping[str, Any]) -> Recipe:
    """A recipe out of what a run has written down, which has every field, and of which nobody has given any now.

    Raises:
        InputError, ValueError: it is none.
    """
    recipe = Recipe.model_validate(data)
    for name in LEAVES:
        forget_given(recipe, name)
    return recipe


def unknown_field(name: str) -> str:
    """The sentence about a field that Recipe has not."""
    if name in SECTIONS:
        return f"{name} must be a section with fields such as {name}.{next(iter(SECTIONS[name].model_fields))}"
    close = [path for path in LEAVES if path.endswith(f".{name}")] or difflib.get_close_matches(name, LEAVES, 1)
    hint = f"perhaps {' or '.join(close)}" if close else "`rotoboa quantize --help` lists the fields"
    return f"there is no field {name} ({hint})"


def complaints(error: ValidationError) -> list[str]:
    """What pydantic found wrong with the fields of a Recipe, each in a few words."""
    found = []
    for item in error.errors():
        if item["loc"][0] == "overrides" and len(item["loc"]) > 1:
            where = ".".join(str(part) for part in item["loc"][2:])
            what = item["msg"].removeprefix("Value error, ")
            found.append(
                f"overrides, entry {int(item['loc'][1]) + 1}{', ' * bool(where)}{where}: {what} "
                f"(given {item['input']!r}); write {legal_values(LEAVES['overrides'])}"
            )
            continue
        name, given = ".".join(str(part) for part in item["loc"][:2]), item["input"]
        shown = given if isinstance(given, str) and given else repr(given)
        known = name in LEAVES
        found.append(f"{name} is {shown} but must be {legal_values(LEAVES[name])}" if known else unknown_field(name))
    return found
