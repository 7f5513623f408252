"""The recipe on the command line: an option for each of its fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer

from ..recipe.fields import SECTIONS, field_paths
from ..recipe.recipe_files import DEFAULT_RECIPE

RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help=f"A name (see `rotoboa recipes`) or file. (default {DEFAULT_RECIPE})",
    ),
]
_Function = TypeVar("_Function", bound=Callable[..., None])


def _recipe_options() -> dict[str, inspect.Parameter]:
    """An option for each field of Recipe, by its dotted name; without it the field is as the recipe says."""
    options = {}
    for field in field_paths():
        section = field.name.rpartition(".")[0]
        kind = next(part for part in (*get_args(field.annotation), field.annotation) if part is not NoneType)
        flag = kind is bool
        if get_origin(field.annotation) is Literal:
            metavar = "|".join(get_args(field.annotation))
        else:
            metavar = {int: "INT", float: "FLOAT", Path: "DIR"}.get(kind, "TEXT")
        option = typer.Option(
            None,
            f"--{field.name}/--no-{field.name}" if flag else f"--{field.name}",
            help=field.description,
            metavar=None if flag else metavar,
            show_default=False,
            rich_help_panel=(SECTIONS[section].__doc__ or "").rstrip(".") if section else None,
        )
        options[field.name] = inspect.Parameter(
            field.name.replace(".", "__"),
            inspect.Parameter.KEYWORD_ONLY,
            default=option,
            # Values stay text here: Recipe alone reads and checks them, for YAML and command line alike.
            annotation=bool | None if flag else str | None,
        )
    return options


RECIPE_OPTIONS = _recipe_options()
"""Parameters of a command by the dotted names of the fields."""


def with_recipe_options(after: str) -> Callable[[_Function], _Function]:
    """Decorates a command with the options of a recipe, behind its parameter `after`; its `**given` takes them."""

    def decorate(command: _Function) -> _Function:
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                parameters.append(parameter)
            if parameter.name == after:
                parameters.extend(RECIPE_OPTIONS.values())
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def overrides(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a recipe that were given as options, by their dotted names."""
    names = {parameter.name: name for name, parameter in RECIPE_OPTIONS.items()}
    return {names[key]: value for key, value in given.items() if value is not None}
