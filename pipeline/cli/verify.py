"""The command `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ...errors import RunError
from .command import print_tables


def verify(
    folder: Annotated[
        Path, typer.Argument(help="Folder of an export, or of a run.", metavar="EXPORT", show_default=False)
    ],
    run: Annotated[Path | None, typer.Option(metavar="RUN", help="Its run. (default where the export says)")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help="The largest difference of a logit allowed. (default 1 % of their "
            "standard deviation, 20 % with quantized activations or cache)",
        ),
    ] = None,
) -> None:
    """Compare the logits of an export with those of its run.

    The export is loaded with its stock reader.
    """
    from .. import verifying

    results = verifying.verify(folder, run=run, tolerance=tolerance)
    table = Table("format", "reader", "largest difference", "std of logits", "same top token", "tolerance", "")
    for r in results:
        limit = "none" if r.tolerance is None else f"{r.tolerance:.3g}"
        row = (f"{r.difference:.3g}", f"{r.deviation:.3g}", f"{r.agreement:.1%}", limit)
        table.add_row(r.format, r.reader, *row, "shown" if r.tolerance is None else "ok" if r.passed else "TOO LARGE")
    print_tables(table)
    if failed := [r for r in results if not r.passed]:
        worst = failed[0]
        raise RunError(
            f"{folder} differs from its run by {worst.difference:.3g} in a logit, above {worst.tolerance:.3g}: "
            "export it again, or give the --tolerance you can live with."
        )
