"""The stages of a run: check, calibrate, quantize block by block, export, evaluate, report."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..boa.block import BlockQuantizer
from ..boa.statistics import InputStatistics
from ..errors import InputError, RunError
from ..export.checkpoint import read_ends, write_native
from ..export.native import pack_block, unpack_block
from .calibration import calibration_tokens, load_texts
from .exporting import base_of, describe, open_finished
from .job import (
    Job,
    check_length,
    dataset_of,
    evaluation_sets,
    evaluation_windows,
    exported_bytes,
    identity,
    length_of,
    prepare,
)
from .measure import bits_per_weight, device_name, loaded, peak_memory, perplexities, plain_forward, sizes
from .progress import Progress
from .recipe import Recipe, recipe_to_yaml, split_names
from .run import REPORT, RunFolder, recipe_of, write_json
from .seeds import choose_seed
from .tasks import task_scores, tasks_of


def quantize(recipe: Recipe, *, device: str | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Run a recipe from its checkpoint to a finished, measured run folder; returns the report.

    Raises:
        InputError: something in the recipe cannot be used; nothing was written.
        RunError: the run failed; finished blocks are kept, and the same recipe goes on from there.
    """
    started = time.perf_counter()
    progress = progress or Progress(quiet=True)
    if recipe.output is None:
        raise InputError("the recipe has no output folder: give --output.")
    job = prepare(recipe, device)
    folder = RunFolder(recipe.output, identity(job))
    folder.need_space(2 * exported_bytes(job) + 2**24)
    length = length_of(recipe, job.model, job.decoder)
    calibration_set = dataset_of(recipe.calibration.dataset, job.model, "--calibration.dataset")
    evaluated = evaluation_sets(recipe.evaluation.dataset, job.model, "--evaluation.dataset")
    with job.timed("text"):
        tokens = calibration_tokens(
            job.tokenizer,
            load_texts(calibration_set, "calibration"),
            recipe.calibration.samples,
            length,
            recipe.calibration.seed,
            job.decoder.shape.vocabulary,
        )
        split, most = recipe.evaluation.split, recipe.evaluation.windows
        windows = {name: evaluation_windows(job, name, split, length, most) for name in evaluated}
        tasks = tasks_of(job, recipe.evaluation.tasks, recipe.evaluation.tasks_path)
    folder.start(recipe_to_yaml(recipe))

    try:
        seed = folder.manifest.get("rotation_seed")
        if seed is None:
            folder.manifest["rotation_seed"] = seed = choose_seed(job, tokens, progress)
            folder.save()
        job.rotations = job.rotations.reseeded(seed)
        embedding, norm, head = _ends(job)
        plain = plain_forward(job, tokens, progress)
        with job.timed("quantize"):
            streams = _quantize_blocks(job, folder, tokens, embedding, progress)
            head = _correct_head(job, norm, head, *streams)
        with job.timed("export"):
            write_native(folder.path / "model", job.checkpoint, job.spec, _groups(job, folder, embedding, norm, head))
        measured = perplexities(job, folder, windows, (embedding, norm, head), progress)
        if tasks:
            measured["tasks"] = task_scores(job, folder, tasks, progress)
    except (ValueError, RuntimeError, ArithmeticError, MemoryError, OSError, SafetensorError) as error:
        what = str(error).rstrip(".") or type(error).__name__
        raise RunError(
            f"the run in {folder.path} failed: {what}; the same command goes on from its last block."
        ) from error
    report = {
        "model": job.model.name,
        "base": base_of(job.model.name, job.checkpoint.folder),
        **measured,
        "tokens": {"calibration": list(tokens.shape), "evaluation": _shapes(windows)},
        "seconds": {**job.seconds, "total": time.perf_counter() - started},
        "plain_forward_seconds": plain,
        "peak_memory_bytes": peak_memory(job.decoder.device),
        "sizes": sizes(job, folder),
        "memory": loaded(job, length),
        "bits_per_weight": bits_per_weight(job, folder),
        "versions": folder.manifest["identity"]["versions"],
        "python": platform.python_version(),
        "device": device_name(job.decoder.device),
        "recipe": recipe.model_dump(mode="json"),
        "seeds": {"rotation": seed, "calibration": recipe.calibration.seed},
    }
    write_json(folder.path / REPORT, report)
    describe(folder, open_finished(folder), "native", folder.path / "model", folder.path / "model")
    folder.manifest["finished"] = True
    folder.save()
    return report


def evaluate(
    run: Path,
    *,
    dataset: str | Sequence[str] | None = None,
    windows: int | None = None,
    sequence_length: int | None = None,
    tasks: str | Sequence[str] | None = None,
    tasks_path: Path | None = None,
    limit: int | None = None,
    batch: int = 8,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a finished run on texts, or on zero-shot tasks; returns a report of what was measured.

    What the run's report.json does not have yet is added to it: other texts, and tasks. What was cut short by
    `windows`, `sequence_length` or `limit` is not.

    Args:
        run: the folder of the run.
        dataset: texts, a list or with commas; None: those of the run.
        windows: of each text; None: as in the run.
        sequence_length: tokens of a window; None: as in the run.
        tasks: zero-shot tasks, a list or with commas; without `dataset`, no text is measured beside them.
        tasks_path: folder of task files that `tasks` may name; without `tasks`, all of them.
        limit: items of a task; None: all.
        batch: sequences of a task computed at a time.
        device: where to compute; None: CUDA where it is, else the CPU.
        progress: told of each step.

    Raises:
        InputError: there is no finished run, or a text or a task cannot be used.
    """
    progress = progress or Progress(quiet=True)
    folder, report = RunFolder.open(run), _read_report(run / REPORT)
    recipe = recipe_of(run).model_copy(update={"output": run})
    job = prepare(recipe, device)
    length = sequence_length or length_of(recipe, job.model, job.decoder)
    check_length(length, job.decoder, job.model, "--sequence-length")
    asked = tasks_of(job, split_names(tasks), tasks_path)
    split, most = recipe.evaluation.split, windows or recipe.evaluation.windows
    tokens: dict[str, Tensor] = {}
    if dataset or not asked:
        chosen = evaluation_sets(split_names(dataset) or recipe.evaluation.dataset, job.model, "--dataset")
        tokens = {name: evaluation_windows(job, name, split, length, most) for name in chosen}
    job.spec = replace(job.spec, clips=folder.clips())
    measured: dict[str, dict[str, Any]] = perplexities(
        job, folder, tokens, read_ends(run / "model", job.decoder.family), progress
    )
    if asked:
        measured["tasks"] = task_scores(job, folder, asked, progress, limit=limit, batch=batch)
    if not (windows or sequence_length or limit):
        _add(report, measured, _shapes(tokens))
        write_json(run / REPORT, report)
    return {
        **measured,
        "tokens": {"evaluation": _shapes(tokens)},
        "seconds": job.seconds,
        "sizes": sizes(job, folder),
        "memory": loaded(job, length),
    }


def _read_report(path: Path) -> dict[str, Any]:
    """The report of a finished run.

    Raises:
        InputError: there is none, or it is damaged.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report["perplexity"], dict):
            raise ValueError("it has no perplexities")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}): it is not the report of a finished run.") from error
    return dict(report)


def _add(report: dict[str, Any], measured: Mapping[str, dict[str, Any]], windows: Mapping[str, Any]) -> None:
    """Add the texts that a report has not, and tasks."""
    new = [dataset for dataset in windows if dataset not in report["perplexity"]]
    for name in ("perplexity", "divergence"):
        report[name] = report.get(name, {}) | {dataset: measured[name][dataset] for dataset in new}
    if new:
        known = report.get("tokens", {}).get("evaluation")
        of_new = {dataset: windows[dataset] for dataset in new}
        report["tokens"]["evaluation"] = (known if isinstance(known, dict) else {}) | of_new
    if "tasks" in measured:
        others = {name: found for name, found in report.get("tasks", {}).items() if name != "average"}
        report["tasks"] = {**others, **measured["tasks"]}
        if set(others) - set(measured["tasks"]):  # the average is of the new ones alone
            report["tasks"].pop("average", None)


def _shapes(windows: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {dataset: list(tokens.shape) for dataset, tokens in windows.items()}


def _ends(job: Job) -> tuple[Tensor, Tensor, Tensor]:
    """Embedding, final norm and head, rotated, in the checkpoint's dtype: what is stored is what is measured."""
    c, dtype = job.checkpoint, job.checkpoint.dtype
    embedding = job.rotations.rotate_embedding(c.embedding()).to(dtype)
    head, norm = job.rotations.rotate_head(c.head(), c.final_norm(), job.decoder.family)
    return embedding, norm.to(dtype), head.to(dtype)


def _quantize_blocks(
    job: Job, folder: RunFolder, tokens: Tensor, embedding: Tensor, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Every block that is not finished yet; returns both streams as they leave the last one."""
    compute, family = job.decoder, job.decoder.family
    full = embedding[tokens].to(compute.dtype)
    quantized = full.clone()
    finished = folder.finished_blocks()
    transforms, clips = job.spec.transforms(compute.shape), folder.clips()
    progress.stage("quantize", compute.shape.blocks)
    for index in range(compute.shape.blocks):
        start = time.perf_counter()
        rotated = job.rotations.rotate_block(job.checkpoint.block(index), family, index)
        done = None
        if index < finished:
            columns = {name: rotated[f"{name}.weight"].shape[1] for name in family.projections}
            done = unpack_block(folder.read_block(index), family, job.spec.bits, columns)
        solver = BlockQuantizer(
            compute,
            compute.block(index, rotated),
            job.settings,
            transforms if done is None else transforms.with_clips(clips[index]),
            batch=job.recipe.calibration.batch,
            report=partial(_show, progress, index),
            done=done,
            search_inputs=job.recipe.activations.search and done is None,
            search_cache=job.recipe.cache.search and done is None,
        )
        try:
            solver.run(full, quantized)
        except ValueError as error:
            raise RunError(f"block {index}, {error}: look for NaN or Inf in the checkpoint.") from error
        if done is None:
            layers = {name: {"loss": loss} for name, loss in solver.losses.items()}
            tensors = pack_block(solver.results, rotated, job.spec.bits, job.checkpoint.dtype)
            entry = {"seconds": time.perf_counter() - start, "layers": layers, "clips": solver.transforms.clips}
            folder.write_block(index, tensors, entry)
        progress.advance(block=index)
    job.spec = replace(job.spec, clips=folder.clips())
    return full, quantized


@torch.no_grad()
def _correct_head(job: Job, norm: Tensor, head: Tensor, full: Tensor, quantized: Tensor) -> Tensor:
    """The output layer, which is not quantized, moved to make up for what the last hidden states lost.

    It is the target shift of any projection, W* = W (I + alpha R H_in^-1), with no rounding after it.
    """
    weights = job.recipe.weights
    if weights.head == 0 or weights.method == "rtn":
        return head
    final, statistics = job.decoder.norm(norm), InputStatistics()
    for f, q in zip(*(stream.split(job.recipe.calibration.batch) for stream in (full, quantized)), strict=True):
        statistics.add(final(f.to(job.decoder.device)), final(q.to(job.decoder.device)))
    objective = statistics.objective().damped(weights.damping)
    moved = objective.target(head.to(job.decoder.device, job.decoder.dtype)[None], weights.head)[0]
    return moved.to(head.dtype).cpu()


def _show(progress: Progress, index: int, name: str, loss: float) -> None:
    progress.advance(0, block=index, layer=name, loss=loss)


def _groups(job: Job, folder: RunFolder, embedding: Tensor, norm: Tensor, head: Tensor) -> Iterator[dict[str, Tensor]]:
    f = job.decoder.family
    yield {f"{f.embedding}.weight": embedding}
    for index in range(job.decoder.shape.blocks):
        yield {f"{f.layers}.{index}.{name}": tensor for name, tensor in folder.read_block(index).items()}
    yield {f"{f.final_norm}.weight": norm, f"{f.head}.weight": head}
