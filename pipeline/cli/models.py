"""The command `models`."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from .command import print_tables


def models() -> None:
    """List the short names of models. Any folder with a checkpoint or Hugging Face id works as well."""
    from ...models.aliases import ALIASES

    table = Table("name", "source", "data set", "sequence length")
    for alias in ALIASES:
        source = "embedded, no download" if Path(alias.source).is_absolute() else alias.source
        table.add_row(alias.name, source, alias.dataset, str(alias.sequence_length))
    print_tables(table)
