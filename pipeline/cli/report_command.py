"""The command `report`."""

from __future__ import annotations

import typer

from .command import Runs


def report(runs: Runs) -> None:
    """Make report.html again, beside other runs.

    Beside the other runs given, or else those in the same folder. What has changed since: other runs, or their
    figures. What a run measured of itself stays as it is.
    """
    from ..measure.pages import siblings, write_page

    for run in runs:
        others = [other for other in runs if other.resolve() != run.resolve()] or siblings(run)
        typer.echo(write_page(run, others))
