"""The command line. Slow imports (torch, transformers) are inside the commands, so that help is quick."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from .command import Command
from .compare import compare
from .evaluate import evaluate
from .export import export
from .inspect import inspect
from .models import models
from .quantize import quantize
from .recipes import recipes
from .report_command import report
from .verify import verify

app = typer.Typer(
    help="Large language models to 4 and 2 bits: Hadamard rotations and attention-aware error compensation.",
    epilog="Start with `rotoboa quantize`: it quantizes and measures the embedded model, without a download.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's help cuts long option names off at 80 columns
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rotoboa {version('rotoboa')}")
        raise typer.Exit()


@app.callback()
def _global_options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


for _command in (quantize, evaluate, inspect, compare, report, models, recipes, export, verify):  # as help lists them
    app.command(cls=Command)(_command)


def main() -> None:
    """Entry point of the command `rotoboa`."""
    app(prog_name="rotoboa")
