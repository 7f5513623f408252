"""The stages of a run: check, calibrate, quantize block by block, export, evaluate, report."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ..boa.ranks import Ranks
from ..errors import InputError, RunError
from ..eval.zeroshot import Tasks
from ..export.writing import write_native
from ..models.outer_layers import OuterLayers
from .budget.choosing import choose_bits
from .console.progress import Progress
from .console.sizes import bits_of_file, exported_sizes, was_tied
from .estimate.footprint import disk_bytes
from .exporting import base_of, describe, open_finished
from .job.checks import length_of
from .job.clock import Clock
from .job.identity import checkpoint_checksums, identity, tokens_checksum
from .job.job import Job, prepare
from .job.notices import early_notices
from .job.sharing import check_alike, followed, own_share, shared_outer_layers, shared_tokens
from .job.texts import calibration_windows, dataset_of, evaluation_sets, evaluation_windows
from .measure.activation_profile import ACTIVATIONS, ActivationProfile
from .measure.evaluating import shapes
from .measure.measuring import (
    bits_per_weight,
    device_name,
    fallback_notices,
    loaded,
    peak_so_far,
    perplexities,
    plain_forward,
    raised_damping,
    sizes,
    stage_seconds,
)
from .measure.pages import siblings, write_page
from .measure.sources import measure_sources
from .measure.tasks import task_scores, tasks_of
from .quantizing import quantize_blocks
from .ranks.distributed import joined, shared_by
from .recipe.recipe import Recipe
from .recipe.recipe_files import recipe_to_yaml
from .rotating.balancing import Balance, balanced
from .rotating.outside_blocks import corrected_head, rotated_outer_layers, rotated_towers, rounded_embedding
from .rotating.placing import noise_of_r1, settle
from .rotating.seeds import choose_seed
from .storage.atomic import write_json, write_tensors
from .storage.files import REPORT
from .storage.prefetch import Prefetcher
from .storage.run_folder import RunFolder
from .storage.run_report import REPORT_VERSION, Report, Seeds, Tokens
from .storage.run_writer import FollowedRun, RunWriter


def quantize(recipe: Recipe, *, device: str | None = None, progress: Progress | None = None) -> Report:
    """Run a recipe from its checkpoint to a finished, measured run folder; returns the report.

    Raises:
        InputError: something in the recipe cannot be used; nothing was written.
        RunError: the run failed; finished blocks are kept, and the same recipe goes on from there.
    """
    with joined(deterministic=recipe.deterministic, timeout=recipe.timeout, device=device) as ranks:
        return _quantize(recipe, device, progress or Progress(quiet=True), ranks)


def _quantize(recipe: Recipe, device: str | None, progress: Progress, ranks: Ranks) -> Report:
    clock = Clock()
    output = recipe.output
    if output is None:
        raise InputError("the recipe has no output folder: give --output.")
    job = prepare(recipe, device, ranks, clock)
    recipe = job.recipe  # as it is carried out
    length, mine = length_of(recipe, job.model, job.decoder), None
    if ranks.rank == 0:
        mine = RunWriter(output, identity(job))
        mine.at_work = ranks.tick
        if not mine.manifest.knows("notices"):
            mine.note(notices=early_notices(recipe, job.decoder, length) if mine.is_new else ())
        job = job.with_notices(*mine.manifest.notices)
        for notice in job.found:
            progress.log(notice)
        mine.need_space(disk_bytes(job, recipe.calibration.samples * length))
    own_share(job, recipe.calibration.samples)
    check_alike(job)
    folder = followed(ranks, mine, output)
    calibration_set = dataset_of(recipe.calibration.dataset, job.model, "--calibration.dataset")
    evaluated = evaluation_sets(recipe.evaluation.dataset, job.model, "--evaluation.dataset")
    with job.timed("text"):
        tokens = shared_tokens(ranks, partial(calibration_windows, job, calibration_set, length))
        split, most = recipe.evaluation.split, recipe.evaluation.windows
        windows = {
            name: shared_tokens(ranks, partial(evaluation_windows, job, name, split, length, most))
            for name in evaluated
        }
        tasks = tasks_of(job, recipe.evaluation.tasks, recipe.evaluation.tasks_path)
    if mine is not None:
        files = checkpoint_checksums(job, mine.manifest.files, progress)
        texts = {"calibration": tokens, **{f"evaluation {name}": text for name, text in windows.items()}}
        mine.identify(
            checkpoint={name: entry.sha256 for name, entry in files.items()},
            text={name: tokens_checksum(text) for name, text in texts.items()},
            bos=job.bos,
        )
        mine.note(files=files)
        if job.model.is_local:  # a relative name means another folder, or a hub id, from elsewhere
            mine.note(checkpoint_folder=str(job.checkpoint.folder.resolve()))
        mine.finished_blocks()
    clock.go_on(folder.manifest.seconds)
    try:
        folder.start(recipe_to_yaml(recipe), clock.spent)
        return _run(job, folder, tokens, windows, tasks, progress)
    except (ValueError, RuntimeError, ArithmeticError, MemoryError, OSError, SafetensorError) as error:
        what = str(error).rstrip(".") or type(error).__name__
        raise RunError(
            f"the run in {folder.path} failed: {what}; the same command goes on from its last block."
        ) from error
    finally:
        folder.close()


def _run(
    job: Job,
    folder: FollowedRun,
    tokens: Tensor,
    windows: Mapping[str, Tensor],
    tasks: Tasks | None,
    progress: Progress,
) -> Report:
    """The long work. Each result is in the manifest as soon as it is there, and is not worked out again."""
    recipe, ranks = job.recipe, job.ranks
    job, seed = _decided(job, folder, tokens, progress)
    if not folder.manifest.knows("plain_forward_seconds"):
        first = ranks.rank == 0
        balance = Balance(job, tokens.shape[1]) if recipe.rotation.scale and first else None
        looks = recipe.evaluation.report and first and not job.decoder.family.generic
        profile = ActivationProfile(job, balance) if looks else None
        seconds = plain_forward(job, tokens, progress, [part for part in (balance, profile) if part is not None])
        if balance is not None:
            balance.write(folder.path)
        if profile is not None:
            write_tensors(folder.path / ACTIVATIONS, profile.tensors())
        folder.keep(plain_forward_seconds=seconds)
    job = balanced(job, folder.path)
    exported = ranks.broadcast_value(ranks.rank == 0 and folder.is_exported())
    outer = None if exported else rotated_outer_layers(job)
    if outer is not None and not folder.manifest.knows("budget"):
        folder.keep(budget=choose_bits(job, tokens, outer, progress))
    job = job.budgeted(folder.manifest.budget)
    if outer is not None:
        outer = rounded_embedding(job, outer)
        prefetcher = Prefetcher(job.checkpoint, folder, job.decoder.shape.blocks, job.decoder.device)
        with job.timed("quantize"), prefetcher:
            # Streams get no name: evaluation needs their memory.
            outer = corrected_head(job, outer, *quantize_blocks(job, folder, tokens, outer, progress, prefetcher))
        with job.timed("export"):
            if ranks.rank == 0:
                temporary = folder.path / ".model.tmp"
                tied = outer.tied and not job.spec.tied_head
                write_native(temporary, job.checkpoint, job.spec, _groups(job, folder, outer), tied=tied)
                shutil.rmtree(folder.path / "model", ignore_errors=True)
                temporary.replace(folder.path / "model")
                folder.keep(model=folder.model_files())
            ranks.broadcast_value()  # wait for it
    outer = shared_outer_layers(job, folder)
    perplexity, divergence = perplexities(job, folder, windows, outer, progress)
    more: dict[str, Any] = shared_by(ranks)
    if recipe.evaluation.sources:
        if not folder.manifest.knows("sources"):
            folder.keep(sources=measure_sources(job, folder, windows, outer, progress))
        more["sources"] = folder.manifest.sources
    if tasks:
        more["tasks"] = task_scores(job, folder, tasks, progress)
    peak, known = peak_so_far(job, folder), folder.manifest
    if ranks.rank > 0:
        return Report.model_validate(ranks.broadcast_value())
    report = Report(
        version=REPORT_VERSION,
        model=job.model.name,
        base=base_of(job.model.name, job.checkpoint.folder),
        perplexity=perplexity,
        divergence=divergence,
        tokens=Tokens(calibration=(len(tokens), tokens.shape[1]), evaluation=shapes(windows)),
        bos=job.bos,
        seconds=job.clock.spent(),
        stages=stage_seconds(known.blocks),
        parts=known.parts,
        plain_forward_seconds=known.plain_forward_seconds,
        peak_memory_bytes=peak,
        sizes=sizes(job, folder),
        memory=loaded(job, tokens.shape[1], tied=outer.tied),
        was_tied=was_tied(job.decoder),
        bits_per_weight=bits_per_weight(job, folder),
        bits_per_weight_of_file=bits_of_file(exported_sizes(folder.path / "model"), job.decoder),
        raised_damping=raised_damping(known.blocks),
        versions=known.identity.versions,
        notices=(*job.notices, *fallback_notices(known.blocks)),
        python=platform.python_version(),
        device=device_name(job.decoder.device),
        recipe=recipe.model_dump(mode="json"),
        budget=known.budget,
        seeds=Seeds(rotation=seed, calibration=recipe.calibration.seed),
        **more,
    )
    write_json(folder.path / REPORT, report.to_json())
    describe(folder, open_finished(folder), "native", folder.path / "model", folder.path / "model")
    folder.keep(finished=True)
    if recipe.evaluation.report:
        write_page(folder.path, siblings(folder.path))
    ranks.broadcast_value(report.to_json())
    return report


def _decided(job: Job, folder: FollowedRun, tokens: Tensor, progress: Progress) -> tuple[Job, int]:
    """The job with its rotations where and as calibration text has them best, and the seed of their signs."""
    if not folder.manifest.knows("r1_noise"):
        folder.keep(r1_noise=noise_of_r1(job, tokens, progress))
    settled = settle(job, folder.manifest.r1_noise)
    for notice in settled.found[len(job.found) :] if job.ranks.rank == 0 else ():
        progress.log(notice)
    if folder.manifest.rotation_seed is None:
        folder.keep(rotation_seed=choose_seed(settled, tokens, progress))
    seed = folder.manifest.rotation_seed
    assert seed is not None
    return settled.reseeded(seed), seed


def _groups(job: Job, folder: RunFolder, outer: OuterLayers) -> Iterator[dict[str, Tensor]]:
    f = job.decoder.family
    yield outer.before(f)
    job.buffers.release()
    for index in range(job.decoder.shape.blocks):
        job.ranks.tick()
        yield {f"{f.layers}.{index}.{name}": tensor for name, tensor in folder.read_block(index).items()}
    yield outer.after(f)
    yield from rotated_towers(job)
