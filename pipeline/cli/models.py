"""The command `models`."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from .command import print_tables


def models() -> None:
    """List short names of models, and the architectures.

    Of each architecture it says what it has: rotations, objectives, formats. Any
    folder with a checkpoint or Hugging Face id works as well.
    """
    from ...export.formats.family_table import HEAD, lines
    from ...models.aliases import ALIASES

    table = Table("name", "source", "data set", "sequence length")
    for alias in ALIASES:
        source = "embedded, no download" if Path(alias.source).is_absolute() else alias.source
        table.add_row(alias.name, source, alias.dataset, str(alias.sequence_length))
    architectures = Table(*(name.replace("`", "") for name in HEAD))
    for line in lines():
        architectures.add_row(*(part.replace("`", "") for part in line))
    print_tables(table, architectures)
