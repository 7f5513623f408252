"""The command `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ...errors import InputError
from .command import Runs


def compare(
    runs: Runs,
    form: Annotated[
        Literal["markdown", "csv", "json"] | None,
        typer.Option("--format", metavar="markdown|csv|json", help="(default by --output's name, else markdown)"),
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a file. (default to the screen)")] = None,
) -> None:
    """Compare finished runs in one table.

    It has bits, size, perplexities, tasks, seconds and memory. What makes a run's figures others than those of the
    first, another model or text, is in its notes.
    """
    from ..measure.comparing import comparison, format_of, render
    from ..storage.files import read_report

    form = form or format_of(output)
    text = render(comparison([(run, read_report(run)) for run in runs]), form)
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}): give another --output.") from error
