"""A finished run measured again, on other texts or on zero-shot tasks."""

from __future__ import annotations

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
from ..job.sharing import check_alike, shared_manifest, shared_outer_layers, shared_recipe, shared_tokens
from ..job.texts import evaluation_sets, evaluation_windows
from ..ranks.distributed import joined
from ..recipe.values import split_names
from ..rotating.balancing import balanced
from ..rotating.placing import settle
from ..storage.atomic import write_json
from ..storage.files import REPORT, read_report
from ..storage.manifest import Manifest
from ..storage.run_folder import RunFolder
from ..storage.run_report import REPORT_VERSION, Measured, Report, Tokens
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
) -> Measured:
    """Measure a finished run on texts, by source, or on zero-shot tasks; returns what was measured.

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
) -> Measured:
    first = ranks.rank == 0
    opened = RunFolder.open(run) if first else None
    report = read_report(run) if first else None
    manifest = shared_manifest(ranks, opened)
    folder = opened or RunFolder(run, manifest)
    recipe = shared_recipe(ranks, run)
    # A run of a release before `bos` had windows without.
    bos = bool(manifest.identity.bos)
    recipe = recipe.model_copy(update={"output": run, "model": _model_of(recipe.model, manifest), "bos": bos})
    job = settle(prepare(recipe, device, ranks), manifest.r1_noise).budgeted(manifest.budget)
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
    outer, more = shared_outer_layers(job, folder), dict[str, Any]()
    if sources:
        seed = recipe.rotation.seed if manifest.rotation_seed is None else manifest.rotation_seed
        made = balanced(job.reseeded(seed), run)
        more["sources"] = measure_sources(made, folder, tokens, outer, progress, windows or SOURCE_WINDOWS)
        tokens = tokens if dataset else {}
    perplexity, divergence = perplexities(job, folder, tokens, outer, progress)
    if asked:
        more["tasks"] = task_scores(job, folder, asked, progress, limit=limit, batch=batch)
    if first:
        more |= {"sizes": sizes(job, folder), "memory": loaded(job, length, tied=outer.tied)}
    measured = Measured(
        perplexity=perplexity,
        divergence=divergence,
        tokens=Tokens(evaluation=shapes(tokens)),
        bos=job.bos,
        seconds=job.clock.seconds,
        **more,
    )
    if report is not None and not (windows or sequence_length or limit):
        write_json(run / REPORT, _with(report, measured).to_json())
    return measured


def _model_of(name: str, manifest: Manifest) -> str:
    """The model of a run: a folder that was given by a relative path is found from elsewhere too."""
    folder = manifest.checkpoint_folder
    return name if folder is None or resolves_to_folder(name) else folder


def _check_checkpoint(job: Job, folder: RunFolder, progress: Progress) -> None:
    """Check that the checkpoint is still what the run was made of: its weights, config and tokenizer.

    Raises:
        InputError: it is not, and divergence would be from another model.
    """
    known = folder.manifest.identity.checkpoint
    if known is None:
        return
    found = checkpoint_checksums(job, folder.manifest.files, progress)
    weights = {file.name for file in job.checkpoint.files}
    changed = [
        name
        for name, entry in found.items()
        if entry.sha256 != known.get(name)
        and (name in weights or name == "config.json" or name.startswith("tokenizer"))
    ]
    if changed:
        raise InputError(
            f"{job.checkpoint.folder} is not the checkpoint any more that {folder.path} was made of, with another "
            f"{', '.join(changed)}: bring that back, or quantize this one in another --output."
        )


def _with(report: Report, measured: Measured) -> Report:
    """The report with texts that it has not, sources where it has none, and tasks."""
    new = [dataset for dataset in measured.tokens.evaluation if dataset not in report.perplexity]
    facts: dict[str, Any] = {
        "perplexity": report.perplexity | {dataset: measured.perplexity[dataset] for dataset in new},
        "divergence": report.divergence | {dataset: measured.divergence[dataset] for dataset in new},
    }
    if new:
        windows = {dataset: measured.tokens.evaluation[dataset] for dataset in new}
        facts["tokens"] = report.tokens.model_copy(update={"evaluation": report.tokens.evaluation | windows})
    if measured.sources is not None and report.sources is None:
        facts["sources"] = measured.sources
    if measured.tasks:
        others = {name: found for name, found in report.tasks.items() if name != "average"}
        facts["tasks"] = others | measured.tasks
        if set(others) - set(measured.tasks):  # the average is of the new ones alone
            facts["tasks"].pop("average", None)
    return report.model_copy(update={"version": REPORT_VERSION, **facts})


def shapes(windows: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """(windows, length) of each text."""
    return {dataset: (len(tokens), tokens.shape[1]) for dataset, tokens in windows.items()}
