"""What a person sees of a run: bars while it works, or plain lines without a terminal, and tables at its end."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
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
from .human import human_size, human_time
from .sizes import size_rows

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


def result_table(report: Mapping[str, Any]) -> Table:
    """Perplexity and divergence: a row for each model measured, columns for each data set.

    `report["perplexity"]` is {data set: {"full_precision": 9.1, "rtn": 25.0, "quantized": 9.6}}, and
    `report["divergence"]` {data set: {"kl": 0.05, "top1": 0.9, "rtn": {"kl": 0.9, "top1": 0.5}}}; what was not
    measured is left out or None.
    """
    perplexity: Mapping[str, Mapping[str, float | None]] = report.get("perplexity") or {}
    divergence: Mapping[str, Mapping[str, Any]] = report.get("divergence") or {}
    table = Table(title="Perplexity", title_justify="left")
    table.add_column("model")
    for dataset in perplexity:
        table.add_column(dataset, justify="right")
        if dataset in divergence:
            table.title = "Perplexity, and divergence from full precision"
            table.add_column("KL (nats)", justify="right")
            table.add_column("same top-1", justify="right")
    if report.get("bos") and perplexity:
        table.caption = "Every window of text begins with BOS."
    for key, label in MODELS.items():
        if all(row.get(key) is None for row in perplexity.values()):
            continue
        cells = []
        for dataset, row in perplexity.items():
            cells.append(_cell(row.get(key), "{:,.3f}"))
            if dataset in divergence:
                found = divergence[dataset] if key == "quantized" else divergence[dataset].get(key) or {}
                cells += [_cell(found.get("kl"), "{:.4f}"), _cell(found.get("top1"), "{:.1%}")]
        table.add_row(label, *cells, style="bold" if key == "quantized" else None)
    return table


def task_table(report: Mapping[str, Any]) -> Table:
    """Zero-shot results: a row for each task, a column for each model, with standard errors.

    `report["tasks"]` is {task: {"metric": "acc", "full_precision": 0.7, "full_precision_stderr": 0.02, "quantized":
    0.6, "stderr": 0.02}}; `stderr` is that of the quantized model.
    """
    tasks: Mapping[str, Mapping[str, Any]] = report.get("tasks") or {}
    table = Table(title="Zero-shot tasks", title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    measured = {key: label for key, label in MODELS.items() if any(key in found for found in tasks.values())}
    for label in measured.values():
        table.add_column(label, justify="right")
    for name, found in tasks.items():
        errors = {key: found.get("stderr" if key == "quantized" else f"{key}_stderr") for key in measured}
        cells = [_cell(found.get(key), "{:.3f}") + _cell(errors[key], " ± {:.3f}") for key in measured]
        average = name == "average"
        metric = "" if average else found["metric"]
        table.add_row(name, metric, *cells, style="bold" if average else None)
    return table


def source_table(report: Mapping[str, Any]) -> Table:
    """What each quantizer costs alone, where `report["sources"]` has it."""
    sources: Mapping[str, Any] | None = report.get("sources")
    table = Table(title="Where the loss comes from: each quantizer alone", title_justify="left")
    for number, title in enumerate(source_tables.COLUMNS):
        table.add_column(title, justify="right" if number else "left")
    for row in source_tables.rows(sources) if sources else ():
        table.add_row(*row, style="bold" if row[0] == source_tables.LABELS["all"] else None)
    table.caption = source_tables.BY_BLOCK
    table.caption_justify = "left"
    return table


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def cost_table(report: Mapping[str, Any]) -> Table:
    """What it took and what it takes.

    `report["seconds"]` is {stage: seconds}, sizes on disk are as of `size_rows`; `report["memory"]` has, of the loaded
    model and of its cache, {"bfloat16": bytes, "quantized": bytes}, and of the cache the number of tokens.
    """
    table = Table(title="Time and size", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for stage, seconds in (report.get("seconds") or {}).items():
        table.add_row(stage.replace("_", " "), human_time(seconds))
    if table.rows:
        table.add_section()
    for row in size_rows(report):
        table.add_row(*row)
    memory: Mapping[str, Mapping[str, int]] = report.get("memory") or {}
    if memory and table.rows:
        table.add_section()
    for name, held in memory.items():
        of = f" of {held['tokens']:,} tokens" if "tokens" in held else ""
        share = f"{held['quantized'] / held['bfloat16']:.0%} of bfloat16"
        table.add_row(f"{name}{of} in memory", f"{human_size(held['quantized'])}, {share}")
    return table


def short_layer(name: str) -> str:
    """A projection's name without its module; experts of a kind, of which there can be hundreds, share one."""
    short = re.sub(r".*\bexperts\.(\d+\.)?", "experts ", name)
    return short if short != name else name.rpartition(".")[2]


def loss_table(blocks: list[dict[str, Any]]) -> Table:
    """The loss of each layer of each block, as a manifest lists them; of experts the mean, as there can be hundreds."""
    columns: dict[str, None] = {}
    rows: list[tuple[dict[str, Any], dict[str, list[float]]]] = []
    for block in blocks:
        losses: dict[str, list[float]] = {}
        for name, layer in (block.get("layers") or {}).items():
            losses.setdefault(short_layer(name), []).append(layer["loss"])
        columns |= dict.fromkeys(losses)
        rows.append((block, losses))
    table = Table(title="Loss of each layer", title_justify="left")
    for column in ("block", "seconds", *columns):
        table.add_column(column, justify="right")
    for block, losses in rows:
        cells = [f"{mean(losses[column]):.3g}" if column in losses else "" for column in columns]
        seconds = block.get("seconds")
        table.add_row(str(block.get("index", "")), "" if seconds is None else f"{seconds:.1f}", *cells)
    return table
