"""The command line. Slow imports (torch, transformers) are inside the commands, so that help is quick."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from .command import Command, Commands
from .compare import compare
from .evaluate import evaluate
from .export import export
from .inspect import inspect
from .models import models
from .quantize import quantize
from .recipes import recipes
from .report_command import report
from .verify import verify

# \b keeps the lines of a paragraph as they are.
EXAMPLES = """\b
Examples:
  rotoboa quantize                                      the embedded model
  rotoboa quantize --model llama3.2-1b --recipe w4a16   a model of the hub
  rotoboa inspect runs/tiny-w4a4kv4                     what a run reached
"""

app = typer.Typer(
    cls=Commands,
    help="Large language models to 4 and 2 bits: Hadamard rotations and attention-aware error compensation.",
    epilog=EXAMPLES,
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


PANELS = {
    "Quantize": (quantize, inspect),
    "Measure": (evaluate, compare, report),
    "Use elsewhere": (export, verify),
    "Names": (recipes, models),
}
"""The commands as help lists them."""

for _panel, _commands in PANELS.items():
    for _command in _commands:
        app.command(cls=Command, rich_help_panel=_panel)(_command)


def main() -> None:
    """Entry point of the command `rotoboa`."""
    app(prog_name="rotoboa")
