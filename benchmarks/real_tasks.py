"""Zero-shot tasks of a real model and of finished runs of it, side by side.

    python benchmarks/real_tasks.py --model M --runs runs/a,runs/b --tasks-path DIR     writes real-tasks-M.md and .json

Models are computed in bfloat16, as they are stored. A task that is done is kept, by what the model's files, the task
and the number of items are: an interrupted measurement goes on, and full precision is measured once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import HERE, file_name
from transformers import AutoModelForCausalLM, AutoTokenizer

from rotoboa.errors import InputError
from rotoboa.eval.zeroshot import PAPER_TASKS, Score, average, load_tasks, task_names, zero_shot
from rotoboa.export.formats.native import load_native
from rotoboa.pipeline.job.job import prepare
from rotoboa.pipeline.recipe.recipe_files import build_recipe
from rotoboa.pipeline.storage.atomic import write_json, write_text
from rotoboa.pipeline.storage.files import read_report

FULL = "full precision"
Scores = dict[str, dict[str, Any]]
"""By fingerprint: subject, task, metric, value, stderr."""


def mark(folder: Path, task: str, limit: int | None) -> str:
    """The fingerprint of a task on the model of a folder: of all its tensors."""
    digest = hashlib.sha256(f"{task} {limit}".encode())
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def loaded(folder: Path, *, native: bool) -> tuple[Any, Any]:
    """A model in bfloat16 and its tokenizer."""
    if native:
        model, tokenizer = load_native(folder, dtype=torch.bfloat16)
        return model.eval(), tokenizer
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, trust_remote_code=False, use_safetensors=True
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def measure(
    subjects: Mapping[str, Path], names: list[str], folder: Path | None, limit: int | None, batch: int, file: Path
) -> Scores:
    """What is missing of every subject and task; each score is kept as it is found.

    Raises:
        InputError: a model or a task cannot be used.
    """
    kept: Scores = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    wanted: Scores = {}
    bos = prepare(build_recipe({}, {"model": str(subjects[FULL])})).bos
    for subject, path in subjects.items():
        prints = {name: mark(path, name, limit) for name in names}
        missing = [name for name in names if prints[name] not in kept]
        model, tokenizer = loaded(path, native=subject != FULL) if missing else (None, None)
        for name in missing:
            tasks = load_tasks([name], [folder] if folder else [])
            (score,) = zero_shot(model, tokenizer, tasks, limit=limit, batch=batch, bos=bos).values()
            kept[prints[name]] = {"subject": subject, "task": name, **vars(score)}
            write_json(file, kept)
            print(f"{subject}, {name}: {score.metric} {score.value:.3f}", flush=True)
        wanted |= {prints[name]: kept[prints[name]] | {"subject": subject} for name in names}
    return wanted


def document(scores: Scores, kl: Mapping[str, float], model: str, limit: int | None) -> str:
    """The page: a row for each subject, a column for each task."""
    subjects = list(dict.fromkeys(found["subject"] for found in scores.values()))
    tasks = list(dict.fromkeys(found["task"] for found in scores.values()))
    cell = {(found["subject"], found["task"]): found for found in scores.values()}
    metrics = {task: cell[subjects[0], task]["metric"] for task in tasks}
    items = "all items" if limit is None else f"the first {limit} items of each"
    means = {
        subject: average(
            [Score(metrics[task], cell[subject, task]["value"], cell[subject, task]["stderr"]) for task in tasks]
        )
        for subject in subjects
    }
    first = means[subjects[0]]
    error = f"{first.stderr:.3f}" if first and first.stderr else "unknown"
    heads = [f"{task.removeprefix('local_')}, {metrics[task]}" for task in tasks]
    lines = [
        f"# {model}: zero-shot tasks",
        "",
        f"Made by `benchmarks/real_tasks.py`: {items}, no examples in the prompt, models in bfloat16, by lm-eval.",
        f"The standard error of an average is {error}; as the items are the same, differences are surer than that.",
        "",
        f"| | KL | {' | '.join(heads)} | average |",
        f"|---|---|{'---|' * (len(tasks) + 1)}",
    ]
    for subject in subjects:
        divergence, whole = f"{kl[subject]:.4f}" if subject in kl else "", means[subject]
        values = [f"{cell[subject, task]['value']:.3f}" for task in tasks]
        lines.append(f"| {subject} | {divergence} | {' | '.join(values)} | {f'{whole.value:.3f}' if whole else ''} |")
    return "\n".join([*lines, ""])


def divergence(run: Path) -> float | None:
    """KL on the text that a run was measured on; None where there are several."""
    found = read_report(run).divergence
    return next(iter(found.values())).kl if len(found) == 1 else None


def main(
    model: Annotated[str, typer.Option(help="The folder of the checkpoint.")],
    runs: Annotated[str, typer.Option(help="Folders of finished runs of it, with commas; their names are the rows.")],
    tasks: Annotated[str, typer.Option(help="lm-eval's names, with commas. (default the eight of the BoA paper)")] = "",
    tasks_path: Annotated[Path | None, typer.Option(help="Folder of task files; without --tasks, all of them.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Items of a task; 0: all.")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="Sequences computed at a time.")] = 16,
    threads: Annotated[int, typer.Option(min=0, help="0: all.")] = 0,
) -> None:
    """Measure what is missing and write real-tasks-<model>.md and .json."""
    torch.set_num_threads(threads or os.cpu_count() or 1)
    name = file_name("real-tasks", model)
    try:
        names = tasks.split(",") if tasks else task_names(tasks_path) if tasks_path else list(PAPER_TASKS)
        folders = {Path(run).name: Path(run) for run in runs.split(",")}
        subjects = {FULL: Path(model), **{label: run / "model" for label, run in folders.items()}}
        for path in subjects.values():
            if not list(path.glob("*.safetensors")):
                raise InputError(f"{path} holds no safetensors: give the checkpoint's folder, and those of its runs.")
        scores = measure(subjects, names, tasks_path, limit or None, batch, HERE / f"{name}.json")
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    kl = {label: found for label, run in folders.items() if (found := divergence(run)) is not None}
    write_text(HERE / f"{name}.md", document(scores, kl, Path(model).name, limit or None))
    print(f"wrote {name}.md")


if __name__ == "__main__":
    typer.run(main)
