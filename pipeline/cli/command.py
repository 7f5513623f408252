"""What the commands have in common: errors and exit codes, help in panels, options, tables."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperArgument, TyperCommand, TyperGroup

from ...errors import InputError, RunError
from ..ranks import launch

Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="Where to compute, such as cpu or cuda:1. (default cuda, else cpu)")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Run = Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN", show_default=False)]
Runs = Annotated[list[Path], typer.Argument(help="Folders of finished runs.", metavar="RUN...", show_default=False)]


class Commands(TyperGroup):
    """All commands; help lists them by panel, in the order in which they were added."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """A section for each panel, the names of all as wide as the widest."""
        panels: dict[str, list[tuple[str, str]]] = {}
        width = max(map(len, self.commands))
        for name, command in self.commands.items():
            said = command.get_short_help_str(formatter.width - width - 6)
            panels.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append((name, said))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl([(name.ljust(width), said) for name, said in rows])


class Command(TyperCommand):
    """A command whose errors are one sentence and an exit code, and whose help groups options by panel."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments and options first, then the panels in the order of their options."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                panel = "Arguments" if isinstance(parameter, TyperArgument) else "Options"
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or panel, []).append(record)
        for panel in sorted(panels, key=lambda name: name not in ("Arguments", "Options")):
            with formatter.section(panel):
                formatter.write_dl(panels[panel])

    def invoke(self, ctx: Any) -> Any:
        """Run the command: 2 is the exit code of an InputError, 1 of any other error, 130 of an interrupt."""
        console = Console(stderr=True)
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            more = "; the same command goes on from here" if ctx.info_name == "quantize" else ""
            if launch.rank() == 0:
                console.print(f"Interrupted{more}.")
            _leave(130)
            raise typer.Exit(130) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # `| head` has enough; typer ends quietly
            if ctx.find_root().params.get("debug"):
                traceback.print_exc()
            message, code = " ".join(str(error).split()), 2 if isinstance(error, InputError) else 1
            if not isinstance(error, InputError | RunError):
                what = f"{type(error).__name__}: {message}" if message else type(error).__name__
                again = f"`rotoboa --debug {ctx.info_name} ...`"
                message = f"unexpected {what}; please report it, with the traceback that {again} shows."
            if not getattr(error, "silent", False):  # another rank says it
                console.print(Text.assemble(("error: ", "bold red"), (message, "red")), soft_wrap=True)
            _leave(code)
            raise typer.Exit(code) from None


def _leave(code: int) -> None:
    """End a process that is one of several at once."""
    if launch.world() > 1:
        from ..ranks.distributed import leave

        leave(code)


def say_idle(reason: str, **given: Any) -> None:
    """Name, on standard error, the options that were given and have no effect; None and False are not given."""
    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value not in (None, False)]
    if names and launch.rank() == 0:
        Console(stderr=True).print(f"Without effect here: {', '.join(names)} ({reason}).", soft_wrap=True, markup=False)


def print_tables(*tables: Table) -> None:
    """Prints tables; as wide as they need where the output is a file or a pipe, which has no width."""
    console = Console()
    if not console.is_terminal:
        console.width = 1000
    for table in tables:
        if table.rows:
            console.print(table)


def facts_table(title: str, value: Any) -> Table:
    """A table of names and values; nested mappings get dotted names."""
    table = Table(title=title.capitalize(), title_justify="left", show_header=False)

    def add(name: str, item: Any) -> None:
        if isinstance(item, dict):
            for key, inner in item.items():
                add(f"{name}.{key}" if name else str(key), inner)
        else:
            table.add_row(name or title, Text("none" if item is None else str(item)))

    add("", value)
    return table
