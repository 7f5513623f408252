"""Recipes read from YAML and options, and written: the packaged ones, files of the user's own, those of runs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ...errors import InputError
from .fields import LEAVES, SECTIONS, complaints, forget_given, unknown_field, value_of
from .recipe import Recipe

DEFAULT_RECIPE = "w4a4kv4"


class Packaged(dict[str, Any]):
    """What a recipe of the package holds: choices of this project, not of its user."""


def _flat(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Fields by their dotted names, and the names of those that are given twice."""
    flat: dict[str, Any] = {}
    doubled: list[str] = []
    for key, value in fields.items():
        found: dict[str, Any] = {}
        if key in SECTIONS and isinstance(value, SECTIONS[key]):
            value = value.model_dump(exclude_unset=True)
        if key in SECTIONS and isinstance(value, Mapping):
            found = {f"{key}.{leaf}": leaf_value for leaf, leaf_value in value.items()}
        elif key not in SECTIONS or value is not None:  # a section whose lines are all commented out is None
            found = {str(key): value}
        doubled += [name for name in found if name in flat]
        flat |= found
    return flat, doubled


def default_output(model: str, recipe: str) -> Path:
    """The folder of a run that names none: runs/<model>-<recipe>."""
    name = Path(model).name or Path(model).resolve().name or "model"
    return Path("runs") / f"{name}-{Path(recipe).stem}"


def recipe_from(recipe: Recipe | str | Path | Mapping[str, Any] | None, fields: Mapping[str, Any]) -> Recipe:
    """The recipe of a call from Python.

    Args:
        recipe: a recipe, its fields, or the name or file of one; None: `DEFAULT_RECIPE`.
        fields: replace its own, by section (`weights={"bits": 3}`) or by dotted names.

    Raises:
        InputError: there is no such recipe, or a field is unknown or illegal.
    """
    recipe = DEFAULT_RECIPE if recipe is None else recipe
    if isinstance(recipe, Recipe):
        return build_recipe(recipe.model_dump(mode="json"), fields) if fields else recipe
    if isinstance(recipe, Mapping):
        return build_recipe(recipe, fields)
    if not isinstance(recipe, str | Path):
        raise InputError(
            f"A recipe is a name such as {DEFAULT_RECIPE}, a .yaml file or a rotoboa.Recipe, and {recipe!r} is none."
        )
    built = build_recipe(load_recipe(str(recipe)), fields)
    if built.output is not None:
        return built
    return built.model_copy(update={"output": default_output(built.model, str(recipe))})


def build_recipe(base: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Validates `base`, as read from YAML, after setting `overrides`, by dotted names or by section.

    The recipe remembers what its user gave (`given_fields`): overrides, and of a file of his own what is not the
    default, since the recipe.yaml of a run has every field.

    Raises InputError, in one sentence, for all unknown fields and illegal values together.
    """
    flat, doubled = _flat(base)
    changed, twice = _flat(overrides or {})
    flat |= changed
    doubled += twice

    nested: dict[str, Any] = {}
    for name, value in flat.items():
        if name in LEAVES:
            section, _, leaf = name.rpartition(".")
            (nested.setdefault(section, {}) if section else nested)[leaf] = value
    wrong = [f"{name} is given twice, with its section and within it" for name in doubled]
    wrong += [unknown_field(name) for name in flat if name not in LEAVES]
    recipe = Recipe.__new__(Recipe)
    try:
        BaseModel.__init__(recipe, **nested)
    except ValidationError as error:
        wrong += complaints(error)
    if wrong:
        raise InputError(f"The recipe cannot be used: {'; '.join(wrong)}.")
    for name in flat.keys() - changed.keys():
        if isinstance(base, Packaged) or value_of(recipe, name) == LEAVES[name].default:
            forget_given(recipe, name)
    return recipe


def recipe_to_yaml(recipe: Recipe) -> str:
    """YAML with every field; `build_recipe` of what it parses to gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, of which YAML would silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    files = resources.files("rotoboa.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def recipe_text(name_or_path: str) -> str:
    """The text of a recipe that comes with the package, or of a file."""
    path = Path(name_or_path)
    if name_or_path in recipe_names():
        return (resources.files("rotoboa.recipes") / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        names = recipe_names()
        close = difflib.get_close_matches(name_or_path, names, 1)
        hint = f"perhaps {close[0]}; " if close else ""
        raise InputError(f"There is no recipe '{name_or_path}': {hint}use one of {', '.join(names)}, or a .yaml file.")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"The recipe {name_or_path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"The recipe {name_or_path} cannot be read: it is not UTF-8 text.") from error


def load_recipe(name_or_path: str) -> dict[str, Any]:
    """Reads a recipe by name or path, without validating its fields: `build_recipe` does, once overrides are set."""
    text = recipe_text(name_or_path)
    try:
        content = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}," if error.problem_mark else ""
        raise InputError(f"The recipe {name_or_path}{line} is not valid YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise InputError(f"The recipe {name_or_path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise InputError(f"The recipe {name_or_path}, line 1, must hold fields such as `model: tiny`, not a {kind}.")
    return Packaged(content) if name_or_path in recipe_names() else content
