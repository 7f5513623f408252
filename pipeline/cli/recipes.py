"""The command `recipes`."""

from __future__ import annotations

from rich.table import Table

from ..recipe.recipe_files import recipe_names, recipe_text
from .command import print_tables


def recipes() -> None:
    """List the recipes that come with the package. Any YAML file with the same fields works as well."""
    table = Table("name", "what it is for")
    for name in recipe_names():
        table.add_row(name, recipe_text(name).partition("\n")[0].lstrip("# "))
    print_tables(table)
