"""Zero-shot tasks of a run: which, and what full precision, RTN and the quantized model reach on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...boa.online.attention import NAME
from ...errors import InputError
from ...eval.results import TaskScore
from ...eval.zeroshot import PAPER_TASKS, Score, Tasks, average, load_tasks, task_names, zero_shot
from ...export.formats.native import load_native
from ...models.aliases import TINY_FOLDER
from ...models.seeing.whole_model import attention_in, auto_class
from ..console.progress import Progress
from ..job.job import Job
from ..storage.run_folder import RunFolder
from .measuring import rounded_block

DEFAULT = "default"
TINY_TASKS = ("tiny_next_line", "tiny_recall", "tiny_agreement")
TINY_TASKS_FOLDER = TINY_FOLDER / "tasks"


def tasks_of(job: Job, names: Sequence[str] | None, folder: Path | None) -> Tasks | None:
    """The tasks of these names with their data, checked before any long work; none where nothing is asked for.

    Args:
        job: whose model decides what the name `default` stands for: the three tasks of the embedded model, or the
            eight of the BoA paper.
        names: of lm-eval, of `folder`, or `default`.
        folder: holds YAML files of tasks; without `names`, all of them.

    Raises:
        InputError: a task is unknown, given twice, or its data cannot be had.
    """
    if not names and folder is None:
        return None
    folders = [TINY_TASKS_FOLDER] if folder is None else [TINY_TASKS_FOLDER, folder]
    in_folder = () if folder is None else task_names(folder)
    default = TINY_TASKS if job.checkpoint.folder.resolve() == TINY_FOLDER else PAPER_TASKS
    wanted = [part for name in names or in_folder for part in (default if name == DEFAULT else (name,))]
    if doubled := sorted({name for name in wanted if wanted.count(name) > 1}):
        raise InputError(f"task {doubled[0]} is given twice: name it once.")
    return load_tasks(wanted, folders)


def task_scores(
    job: Job, folder: RunFolder, tasks: Tasks, progress: Progress, *, limit: int | None = None, batch: int = 8
) -> dict[str, TaskScore]:
    """What the models of a finished run reach on tasks. Each is held whole in memory, one after the other.

    Args:
        job, folder: the run. Each rank of several holds the models whole, and runs its part of the items.
        tasks: of `tasks_of`.
        progress: told of each model.
        limit: items of a task; None: all.
        batch: sequences computed at a time.

    Returns:
        By task; `average`, where there are several and all are accuracies.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, model in _models(job, folder):
        progress.stage(f"tasks {name}", 1)
        with job.timed(f"tasks {name}"):
            scores = zero_shot(
                model.eval(), job.tokenizer, tasks, limit=limit, batch=batch, ranks=job.ranks, bos=job.bos
            )
        del model
        progress.advance()
        key = name.replace(" ", "_")
        mean = average(list(scores.values()))
        for task, score in (scores | ({} if mean is None else {"average": mean})).items():
            found.setdefault(task, {"metric": score.metric}).update(_entries(key, score))
    scored = {task: values | ({} if limit is None else {"limit": limit}) for task, values in found.items()}
    return {task: TaskScore(**values) for task, values in job.ranks.broadcast_value(scored).items()}


def _entries(model: str, score: Score) -> dict[str, float | None]:
    return {model: score.value, "stderr" if model == "quantized" else f"{model}_stderr": score.stderr}


def _models(job: Job, folder: RunFolder) -> Iterator[tuple[str, Any]]:
    """Each model by name. In float32 on the CPU, as perplexity is measured; else in the dtype it is stored in."""
    compute, family = job.decoder, job.decoder.family
    dtype = compute.dtype if compute.device.type == "cpu" else job.checkpoint.dtype
    config = job.checkpoint.config  # of the file, it would say how to run
    options: dict[str, Any] = {"dtype": dtype, "config": config}
    if not family.generic:  # such a class has an attention of its own, which may take no function
        options["attn_implementation"] = attention_in(family, NAME)

    def original() -> Any:
        model = auto_class(family).from_pretrained(
            job.checkpoint.folder, trust_remote_code=False, use_safetensors=True, **options
        )
        return model.to(compute.device)

    yield "full precision", original()
    if job.recipe.evaluation.baseline:
        model = original()
        layers = model.get_submodule(family.layers)
        assert isinstance(layers, nn.ModuleList)
        for index in range(compute.shape.blocks):
            layers[index] = rounded_block(job, index).to(dtype)
        yield "rtn", model
        del model
    model, _ = load_native(folder.path, dtype=dtype)
    yield "quantized", model.to(torch.device(compute.device))
