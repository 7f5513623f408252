"""The commands that list names: `models` and `recipes`."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from ..recipe.recipe_files import recipe_names, recipe_text
from .command import print_tables


def models() -> None:
    """List the short names of models. Any folder with a checkpoint or Hugging Face id works as well."""
    from ...models.aliases import ALIASES

    table = Table("name", "source", "data set", "sequence length")
    for alias in ALIASES:
        source = "embedded, no download" if Path(alias.source).is_absolute() else alias.source
        table.add_row(alias.name, source, alias.dataset, str(alias.sequence_length))
    print_tables(table)


def recipes() -> None:
    """List the recipes that come with the package. Any YAML file with the same fields works as well."""
    table = Table("name", "what it is for")
    for name in recipe_names():
        table.add_row(name, recipe_text(name).partition("\n")[0].lstrip("# "))
    print_tables(table)
