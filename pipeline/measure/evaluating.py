"""A finished run measured again, on other texts or on zero-shot tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ...boa.ranks import Ranks
from ...errors import InputError
from ...models.aliases import resolves_to_folder
from ..console.progress import Progress
from ..estimate.counting import SOURCE_WINDOWS
from ..job.checks import check_length, length_of
from ..job.identity import checkpoint_checksums
from ..job.job import Job, prepare
from ..job.sharing import check_alike, followed, shared_outer_layers, shared_recipe, shared_tokens
from ..job.texts import evaluation_sets, evaluation_windows
from ..ranks.distributed import joined
from ..recipe.values import split_names
from ..rotating.balancing import read_scales
from ..rotating.placing import settle
from ..storage.run_folder import REPORT, RunFolder, write_json
from .measuring import loaded, perplexities, sizes
from .sources import measure_sources
from .tasks import task_scores, tasks_of


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
    sources: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a finished run on texts, by source, or on zero-shot tasks; returns a report of what was measured.

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
        sources: measure what each quantizer costs alone, on the first of the texts: as `measure_sources`. Without
            `dataset`, no perplexity is measured beside it.
        device: where to compute; None: CUDA where it is, else the CPU.
        progress: told of each step.

    Raises:
        InputError: there is no finished run, or a text or a task cannot be used.
    """
    with joined(device=device, again="run the same command again") as ranks:
        return _evaluate(
            ranks, run, dataset, windows, sequence_length, tasks, tasks_path, limit, batch, sources, device,
            progress or Progress(quiet=True),
        )  # fmt: skip


def _evaluate(
    ranks: Ranks,
    run: Path,
    dataset: str | Sequence[str] | None,
    windows: int | None,
    sequence_length: int | None,
    tasks: str | Sequence[str] | None,
    tasks_path: Path | None,
    limit: int | None,
    batch: int,
    sources: bool,
    device: str | None,
    progress: Progress,
) -> dict[str, Any]:
    first = ranks.rank == 0
    folder = followed(ranks, RunFolder.open(run) if first else None, run)
    report = _read_report(run / REPORT) if first else {}
    recipe = shared_recipe(ranks, run)
    # A run of a release before `bos` had windows without.
    bos = folder.manifest["identity"].get("bos", False)
    recipe = recipe.model_copy(update={"output": run, "model": _model_of(recipe.model, folder.manifest), "bos": bos})
    job = prepare(recipe, device, ranks)
    check_alike(job)
    if first:
        _check_checkpoint(job, folder, progress)
    length = sequence_length or length_of(recipe, job.model, job.decoder)
    check_length(length, job.decoder, job.model, "--sequence-length")
    asked = tasks_of(job, split_names(tasks), tasks_path)
    split, most = recipe.evaluation.split, windows or recipe.evaluation.windows
    tokens: dict[str, Tensor] = {}
    if dataset or sources or not asked:
        chosen = evaluation_sets(split_names(dataset) or recipe.evaluation.dataset, job.model, "--dataset")
        tokens = {
            name: shared_tokens(ranks, partial(evaluation_windows, job, name, split, length, most)) for name in chosen
        }
    outer, measured = shared_outer_layers(job, folder), dict[str, dict[str, Any]]()
    if sources:
        settle(job, folder.manifest.get("r1_noise"))
        job.rotations = job.rotations.reseeded(folder.manifest.get("rotation_seed", recipe.rotation.seed))
        if recipe.rotation.scale:
            read_scales(job, run)
        measured["sources"] = measure_sources(job, folder, tokens, outer, progress, windows or SOURCE_WINDOWS)
        tokens = tokens if dataset else {}
    measured |= perplexities(job, folder, tokens, outer, progress)
    if asked:
        measured["tasks"] = task_scores(job, folder, asked, progress, limit=limit, batch=batch)
    if not first:
        return {**measured, "tokens": {"evaluation": shapes(tokens)}, "seconds": job.seconds}
    if not (windows or sequence_length or limit):
        _add(report, measured, shapes(tokens))
        write_json(run / REPORT, report)
    return {
        **measured,
        "tokens": {"evaluation": shapes(tokens)},
        "bos": job.bos,
        "seconds": job.seconds,
        "sizes": sizes(job, folder),
        "memory": loaded(job, length, tied=outer.tied),
    }


def _model_of(name: str, manifest: Mapping[str, Any]) -> str:
    """The model of a run: a folder that was given by a relative path is found from elsewhere too."""
    folder = manifest.get("checkpoint_folder")
    return name if folder is None or resolves_to_folder(name) else str(folder)


def _check_checkpoint(job: Job, folder: RunFolder, progress: Progress) -> None:
    """Check that the checkpoint is still what the run was made of: its weights, config and tokenizer.

    Raises:
        InputError: it is not, and divergence would be from another model.
    """
    known = folder.manifest["identity"].get("checkpoint")
    if known is None:
        return
    found = checkpoint_checksums(job, folder.manifest.get("files", {}), progress)
    weights = {file.name for file in job.checkpoint.files}
    changed = [
        name
        for name, entry in found.items()
        if entry["sha256"] != known.get(name)
        and (name in weights or name == "config.json" or name.startswith("tokenizer"))
    ]
    if changed:
        raise InputError(
            f"{job.checkpoint.folder} is not the checkpoint any more that {folder.path} was made of, with another "
            f"{', '.join(changed)}: bring that back, or quantize this one in another --output."
        )


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
    """Add the texts that a report has not, its sources where it has none, and tasks."""
    new = [dataset for dataset in windows if dataset not in report["perplexity"]]
    for name in ("perplexity", "divergence"):
        report[name] = report.get(name, {}) | {dataset: measured[name][dataset] for dataset in new}
    if new:
        known = report.get("tokens", {}).get("evaluation")
        of_new = {dataset: windows[dataset] for dataset in new}
        report["tokens"]["evaluation"] = (known if isinstance(known, dict) else {}) | of_new
    if "sources" in measured and "sources" not in report:
        report["sources"] = measured["sources"]
    if "tasks" in measured:
        others = {name: found for name, found in report.get("tasks", {}).items() if name != "average"}
        report["tasks"] = {**others, **measured["tasks"]}
        if set(others) - set(measured["tasks"]):  # the average is of the new ones alone
            report["tasks"].pop("average", None)


def shapes(windows: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """(windows, length) of each text."""
    return {dataset: list(tokens.shape) for dataset, tokens in windows.items()}
