"""The command `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..console.progress import Progress, result_table, source_table, task_table
from ..ranks import launch
from ..storage.files import read_manifest
from .command import Device, Quiet, Run, print_tables, say_idle


def evaluate(
    run: Run,
    dataset: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Data sets, with commas. (default those of the run)")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, metavar="INT", help="Windows of text. (default as in the run)")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, metavar="INT", help="Tokens of a window. (default as in the run)")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Zero-shot tasks by lm-eval's names, with commas; 'default': the eight of the BoA paper, or the three "
            "of the embedded model. Text is then measured only where --dataset is given.",
        ),
    ] = None,
    tasks_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of task files that --tasks may name; else all of them.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="INT", help="Items of a task. (default all)")] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="INT", help="Sequences of a task at a time.")] = 8,
    sources: Annotated[
        bool,
        typer.Option(
            "--sources",
            help="Measure what each quantizer costs alone, on at most 4 windows of the first text, or --windows of it. "
            "Perplexity is then only measured where --dataset is given.",
        ),
    ] = False,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Measure a finished run again, on texts or zero-shot tasks.

    Of texts: perplexity, and divergence from full precision. What is measured whole is added to the run's report.
    """
    read_manifest(run)
    if tasks is None and tasks_path is None:
        say_idle("no tasks are measured", limit=limit)
    elif dataset is None and not sources:
        say_idle("no text is measured", windows=windows, sequence_length=sequence_length)

    from ..measure import evaluating

    with Progress(quiet=quiet or launch.rank() > 0) as progress:
        report = evaluating.evaluate(
            run,
            dataset=dataset,
            windows=windows,
            sequence_length=sequence_length,
            tasks=tasks,
            tasks_path=tasks_path,
            limit=limit,
            batch=batch_size,
            sources=sources,
            device=device,
            progress=progress,
        )
    if launch.rank() > 0:
        return
    print_tables(result_table(report), task_table(report), source_table(report))
