"""What a person sees of a run: bars while it works, or plain lines without a terminal, and tables at its end."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from ...eval.drawing import source_tables
from ...eval.results import Distance
from ..storage.manifest import BlockEntry
from ..storage.run_report import Measured
from .human import human_size, human_time
from .sizes import BITS, size_rows

MODELS = {"full_precision": "full precision", "rtn": "RTN, no rotation", "quantized": "quantized"}


def peak_resident() -> int | None:
    """The most bytes of memory that this process has held; None where the system does not tell.

    Linux's `getrusage` begins with what the process that started this one had held; its `VmHWM` does not.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # there is none on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory() -> str:
    """The most memory this process has held, and the most on the GPU where one is in use."""
    held = peak_resident()
    parts = [] if held is None else [human_size(held)]
    torch = sys.modules.get("torch")  # never imported for this alone
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        parts.append(f"GPU {human_size(torch.cuda.max_memory_allocated())}")
    return ", ".join(parts)


def is_watched(console: Console | None = None) -> bool:
    """Whether bars can be shown: on a terminal, or in a notebook, where rich needs ipywidgets for them."""
    console = console or Console(stderr=True)
    if console.is_jupyter:
        return find_spec("ipywidgets") is not None
    return console.is_terminal and not console.is_dumb_terminal


class Progress:
    """Shows the stages of a run one after the other; a context manager.

    On a terminal and in a notebook each stage is a bar. Elsewhere, as in a CI log, it is a plain line for each finished
    block and for each finished stage. `quiet` shows nothing at all. All of it goes to standard error.

        with Progress() as progress:
            progress.stage("quantize", total=2)
            progress.advance(0, block=0, layer="q_proj", loss=0.013)  # within a block: nothing is finished
            progress.advance(block=0)
    """

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.quiet = quiet
        self.console = console or Console(stderr=True)
        live = not quiet and is_watched(self.console)
        self._bars = self._new_bars() if live else None
        self._task: TaskID | None = None
        self._name: str | None = None
        self._total = self._done = 0
        self._started = 0.0
        self._fields: dict[str, Any] = {}

    def _new_bars(self) -> Bars:
        return Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}", style="magenta", markup=False),
            TextColumn("{task.fields[now]}", style="dim", markup=False),
            console=self.console,
            # A block can take minutes; the default of 30 s would forget the one before and give no estimate.
            speed_estimate_period=24 * 3600,
        )

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._finish()
        if self._bars is not None:
            self._bars.stop()

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Finishes the stage before and starts one of `total` steps, `done` of which an earlier run has left."""
        self._finish()
        self._name, self._total, self._done, self._fields = name, total, done, {}
        self._started = time.monotonic()
        if self._bars is not None:
            self._task = self._bars.add_task(name, total=total, completed=done, memory=peak_memory(), now="")

    def advance(self, n: int = 1, *, block: int | None = None, layer: str | None = None, **fields: Any) -> None:
        """Counts `n` steps as finished and shows the fields: `block`, `layer`, `loss`, or any other.

        With `n` = 0 it only shows them. All but `block` are forgotten when the next layer or block is named.
        """
        if self.quiet or self._name is None:
            return
        if layer is not None or block is not None:
            self._fields = {key: value for key, value in self._fields.items() if key == "block"}
        given = {"block": block, "layer": layer, **fields}
        self._fields |= {key: value for key, value in given.items() if value is not None}
        self._done += n
        now = "  ".join(f"{key} {_show(value)}" for key, value in self._fields.items())
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, advance=n, memory=peak_memory(), now=now)
        elif n and block is not None:
            self.log(f"{self._name} {self._done}/{self._total}: {now}, {self._spent()}")

    def log(self, message: str) -> None:
        """Prints a line, above the bars where there are any."""
        if not self.quiet:
            self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def _spent(self) -> str:
        memory = peak_memory()
        return human_time(time.monotonic() - self._started) + (f", {memory}" if memory else "")

    def _finish(self) -> None:
        if self._name is None:
            return
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, now="")
            self._bars.stop_task(self._task)
        else:
            self.log(f"{self._name}: {self._done}/{self._total} in {self._spent()}")
        self._name = self._task = None


def _show(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def result_table(report: Measured) -> Table:
    """Perplexity and divergence: a row for each model measured, columns for each data set.

    Of a model that was not measured on any there is no row.
    """
    perplexity, divergence = report.perplexity, report.divergence
    table = Table(title="Perplexity", title_justify="left")
    table.add_column("model")
    for dataset in perplexity:
        table.add_column(dataset, justify="right")
        if dataset in divergence:
            table.title = "Perplexity, and divergence from full precision"
            table.add_column("KL (nats)", justify="right")
            table.add_column("same top-1", justify="right")
    if report.bos and perplexity:
        table.caption = "Every window of text begins with BOS."
    for key, label in MODELS.items():
        if all(getattr(row, key) is None for row in perplexity.values()):
            continue
        cells = []
        for dataset, row in perplexity.items():
            cells.append(_cell(getattr(row, key), "{:,.3f}"))
            if dataset in divergence:
                far = {"rtn": divergence[dataset].rtn, "quantized": divergence[dataset]}.get(key) or Distance()
                cells += [_cell(far.kl, "{:.4f}"), _cell(far.top1, "{:.1%}")]
        table.add_row(label, *cells, style="bold" if key == "quantized" else None)
    return table


def task_table(report: Measured) -> Table:
    """Zero-shot results: a row for each task, a column for each model, with standard errors."""
    tasks = report.tasks
    table = Table(title="Zero-shot tasks", title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    measured = {
        key: label for key, label in MODELS.items() if any(getattr(found, key) is not None for found in tasks.values())
    }
    for label in measured.values():
        table.add_column(label, justify="right")
    for name, found in tasks.items():
        errors = {key: getattr(found, "stderr" if key == "quantized" else f"{key}_stderr") for key in measured}
        cells = [_cell(getattr(found, key), "{:.3f}") + _cell(errors[key], " ± {:.3f}") for key in measured]
        average = name == "average"
        metric = "" if average else found.metric
        table.add_row(name, metric, *cells, style="bold" if average else None)
    return table


def source_table(report: Measured) -> Table:
    """What each quantizer costs alone, where that was measured."""
    table = Table(title="Where the loss comes from: each quantizer alone", title_justify="left")
    for number, title in enumerate(source_tables.COLUMNS):
        table.add_column(title, justify="right" if number else "left")
    for row in source_tables.rows(report.sources) if report.sources else ():
        table.add_row(*row, style="bold" if row[0] == source_tables.LABELS["all"] else None)
    table.caption = source_tables.BY_BLOCK
    table.caption_justify = "left"
    return table


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def cost_table(report: Measured) -> Table:
    """What it took and what it takes: seconds by stage, bytes on disk as of `size_rows`, and bytes in memory."""
    table = Table(title="Time and size", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for stage, seconds in report.seconds.items():
        table.add_row(stage.replace("_", " "), human_time(seconds))
    if table.rows:
        table.add_section()
    for row in size_rows(report.sizes.to_json(), {name: getattr(report, name) for name in BITS}, report.was_tied):
        table.add_row(*row)
    if report.memory is not None and table.rows:
        table.add_section()
    for name, held in report.memory or ():
        of = "" if held.tokens is None else f" of {held.tokens:,} tokens"
        share = f"{held.quantized / held.bfloat16:.0%} of bfloat16"
        table.add_row(f"{name}{of} in memory", f"{human_size(held.quantized)}, {share}")
    return table


def short_layer(name: str) -> str:
    """A projection's name without its module; experts of a kind, of which there can be hundreds, share one."""
    short = re.sub(r".*\bexperts\.(\d+\.)?", "experts ", name)
    return short if short != name else name.rpartition(".")[2]


def loss_table(blocks: Sequence[BlockEntry]) -> Table:
    """The loss of each layer of each block, as a manifest lists them; of experts the mean, as there can be hundreds."""
    columns: dict[str, None] = {}
    rows: list[tuple[BlockEntry, dict[str, list[float]]]] = []
    for block in blocks:
        losses: dict[str, list[float]] = {}
        for name, layer in block.layers.items():
            losses.setdefault(short_layer(name), []).append(layer.loss)
        columns |= dict.fromkeys(losses)
        rows.append((block, losses))
    table = Table(title="Loss of each layer", title_justify="left")
    for column in ("block", "seconds", *columns):
        table.add_column(column, justify="right")
    for block, losses in rows:
        cells = [f"{mean(losses[column]):.3g}" if column in losses else "" for column in columns]
        table.add_row(str(block.index), _cell(block.seconds, "{:.1f}"), *cells)
    return table
