"""The stages of a run: check, calibrate, quantize block by block, export, evaluate, report."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ..boa.block import BlockQuantizer
from ..boa.ranks import Ranks
from ..boa.stopwatch import STAGES, Stopwatch, stage
from ..errors import InputError, RunError
from ..export.checkpoint import write_native
from ..export.native import pack_block, unpack_block
from ..models.ends import Ends
from .activations import ACTIVATIONS, ActivationProfile
from .buffers import trim
from .checks import length_of
from .distributed import joined, shared_by
from .ends import corrected_head, rotated_ends
from .evaluating import shapes
from .exporting import base_of, describe, open_finished
from .footprint import disk_bytes
from .identity import checkpoint_checksums, identity, tokens_checksum
from .job import Job, prepare
from .measure import (
    bits_per_weight,
    device_name,
    fallback_notices,
    loaded,
    peak_memory,
    perplexities,
    plain_forward,
    sizes,
)
from .overlap import Overlap
from .pages import siblings, write_page
from .progress import Progress
from .recipe import Recipe
from .recipe_files import recipe_to_yaml
from .run import REPORT, RunFolder, write_json, write_tensors
from .seeds import choose_seed
from .sharing import check_alike, followed, own_share, shared_block, shared_ends, shared_tokens
from .tasks import Tasks, task_scores, tasks_of
from .texts import calibration_windows, dataset_of, evaluation_sets, evaluation_windows


def quantize(recipe: Recipe, *, device: str | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Run a recipe from its checkpoint to a finished, measured run folder; returns the report.

    Raises:
        InputError: something in the recipe cannot be used; nothing was written.
        RunError: the run failed; finished blocks are kept, and the same recipe goes on from there.
    """
    with joined(deterministic=recipe.deterministic, timeout=recipe.timeout, device=device) as ranks:
        return _quantize(recipe, device, progress or Progress(quiet=True), ranks)


def _quantize(recipe: Recipe, device: str | None, progress: Progress, ranks: Ranks) -> dict[str, Any]:
    started = time.perf_counter()
    if recipe.output is None:
        raise InputError("the recipe has no output folder: give --output.")
    job = prepare(recipe, device, ranks)
    job.started = started
    length, mine = length_of(recipe, job.model, job.decoder), None
    if ranks.rank == 0:
        mine = RunFolder(recipe.output, identity(job))
        mine.at_work = ranks.tick
        mine.need_space(disk_bytes(job, recipe.calibration.samples * length))
    own_share(job, recipe.calibration.samples)
    check_alike(job)
    folder = followed(ranks, mine, recipe.output)
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
    if ranks.rank == 0:
        files = checkpoint_checksums(job, folder.manifest.get("files", {}), progress)
        texts = {"calibration": tokens, **{f"evaluation {name}": text for name, text in windows.items()}}
        folder.identify(
            checkpoint={name: entry["sha256"] for name, entry in files.items()},
            text={name: tokens_checksum(text) for name, text in texts.items()},
        )
        folder.manifest["files"] = files
        folder.finished_blocks()
    job.go_on(folder.manifest.get("seconds", {}))
    folder.clock = job.spent
    try:
        folder.start(recipe_to_yaml(recipe))
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
    folder: RunFolder,
    tokens: Tensor,
    windows: Mapping[str, Tensor],
    tasks: Tasks | None,
    progress: Progress,
) -> dict[str, Any]:
    """The long work. Each result is in the manifest as soon as it is there, and is not worked out again."""
    recipe, known, ranks = job.recipe, folder.manifest, job.ranks
    if "rotation_seed" not in known:
        folder.keep(rotation_seed=choose_seed(job, tokens, progress))
    seed = known["rotation_seed"]
    job.rotations = job.rotations.reseeded(seed)
    if "plain_forward_seconds" not in known:
        profile = ActivationProfile(job) if recipe.evaluation.report and ranks.rank == 0 else None
        seconds = plain_forward(job, tokens, progress, profile)
        if profile is not None:
            write_tensors(folder.path / ACTIVATIONS, profile.tensors())
        folder.keep(plain_forward_seconds=seconds)
    if ranks.tell(ranks.rank == 0 and folder.is_exported()):
        job.spec = replace(job.spec, clips=folder.clips())
    else:
        ends = rotated_ends(job)
        beside = Overlap(job.checkpoint, folder, job.decoder.shape.blocks, job.decoder.device)
        with job.timed("quantize"), beside:
            streams = _quantize_blocks(job, folder, tokens, ends, progress, beside)
            ends = corrected_head(job, ends, *streams)
        with job.timed("export"):
            if ranks.rank == 0:
                temporary = folder.path / ".model.tmp"
                write_native(temporary, job.checkpoint, job.spec, _groups(job, folder, ends))
                shutil.rmtree(folder.path / "model", ignore_errors=True)
                temporary.replace(folder.path / "model")
                folder.keep(model=folder.model_files())
            ranks.tell()  # wait for it
    ends = shared_ends(job, folder)
    measured = perplexities(job, folder, windows, ends, progress)
    if tasks:
        measured["tasks"] = task_scores(job, folder, tasks, progress)
    peak = _peak(job, folder)
    if ranks.rank > 0:
        found: dict[str, Any] = ranks.tell()
        return found
    report = {
        "model": job.model.name,
        "base": base_of(job.model.name, job.checkpoint.folder),
        **measured,
        "tokens": {"calibration": list(tokens.shape), "evaluation": shapes(windows)},
        "seconds": job.spent(),
        "stages": _stages(folder),
        "parts": known["parts"],
        "plain_forward_seconds": known["plain_forward_seconds"],
        "peak_memory_bytes": peak,
        "sizes": sizes(job, folder),
        "memory": loaded(job, tokens.shape[1]),
        "bits_per_weight": bits_per_weight(job, folder),
        "raised_damping": _raised_damping(folder),
        "versions": known["identity"]["versions"],
        "notices": [*job.notices, *fallback_notices(folder.manifest["blocks"])],
        "python": platform.python_version(),
        "device": device_name(job.decoder.device),
        "recipe": recipe.model_dump(mode="json"),
        "seeds": {"rotation": seed, "calibration": recipe.calibration.seed},
        **shared_by(ranks),
    }
    write_json(folder.path / REPORT, report)
    describe(folder, open_finished(folder), "native", folder.path / "model", folder.path / "model")
    folder.keep(finished=True)
    if recipe.evaluation.report:
        write_page(folder.path, siblings(folder.path))
    ranks.tell(report)
    return report


def _raised_damping(folder: RunFolder) -> dict[str, float]:
    """Layers whose Cholesky decomposition needed more damping than the recipe has, by block and name."""
    return {
        f"{block['index']}.{name}": layer["damping"]
        for block in folder.manifest["blocks"]
        for name, layer in block["layers"].items()
        if "damping" in layer
    }


def _stages(folder: RunFolder) -> dict[str, float]:
    """Seconds by stage of the quantizer, of all blocks."""
    blocks = [block.get("stages", {}) for block in folder.manifest["blocks"]]
    return {name: sum(block.get(name, 0.0) for block in blocks) for name in STAGES}


def _peak(job: Job, folder: RunFolder) -> dict[str, int]:
    """The most memory that any part of the run has held so far on any rank."""
    earlier = folder.manifest.get("peak_memory_bytes", {})
    now = job.ranks.gather({**peak_memory(job.decoder.device), "spilled": job.buffers.peak})
    return {name: max(earlier.get(name, 0), *(held[name] for held in now)) for name in now[0]}


def _quantize_blocks(
    job: Job, folder: RunFolder, tokens: Tensor, ends: Ends, progress: Progress, beside: Overlap
) -> tuple[Tensor, Tensor]:
    """Every block that is not finished yet; returns both streams as they leave the last one."""
    compute, family, ranks, share = job.decoder, job.decoder.family, job.ranks, own_share(job, len(tokens))
    tokens = tokens[share.start : share.stop]
    full, quantized = (job.buffers.empty(*tokens.shape, compute.shape.hidden, dtype=compute.dtype) for _ in range(2))
    for i in range(len(tokens)):
        full[i] = quantized[i] = compute.embed(ends, tokens[i : i + 1])[0]
    finished = len(folder.manifest["blocks"])
    transforms, clips = job.spec.transforms(compute.shape), folder.clips()
    progress.stage("quantize", compute.shape.blocks)
    for index in range(compute.shape.blocks):
        start = time.perf_counter()
        watch = Stopwatch(compute.device)
        with watch, stage("rotation"):
            rotated = job.rotations.rotate_block(beside.block(index), family, index)
        done = None
        if index < finished:
            columns = {name: rotated[f"{name}.weight"].shape[1] for name in family.projections}
            done = unpack_block(shared_block(job, folder, index), family, job.spec.bits, columns)
        block = compute.block(index, rotated)
        projections = {f"{name}.weight" for name in family.projections}
        others = {name: tensor for name, tensor in rotated.items() if name not in projections}
        del rotated  # in float64 it is twice as large as the block
        solver = BlockQuantizer(
            compute,
            block,
            job.settings,
            transforms if done is None else transforms.with_clips(clips[index]),
            batch=job.recipe.calibration.batch,
            report=partial(_show, progress, index),
            done=done,
            search_inputs=job.recipe.activations.search and done is None,
            search_cache=job.recipe.cache.search and done is None,
            empty=job.buffers.empty,
            release=job.release,
            references=job.recipe.evaluation.references and done is None,
            ranks=ranks,
        )
        try:
            with watch:
                solver.run(full, quantized)
        except ValueError as error:
            raise RunError(f"block {index}, {error}: look for NaN, Inf or huge values in the checkpoint.") from error
        if done is None:
            layers: dict[str, dict[str, Any]] = {name: {"loss": loss} for name, loss in solver.losses.items()}
            for name, found in solver.objectives.items():
                layers[name]["objective"] = found
            for name, count in solver.fallbacks.items():
                layers[name]["fallback_tokens"] = count
            for name, damping in solver.damping.items():
                layers[name]["damping"] = damping
                progress.log(f"block {index}, {name}: Cholesky failed; damping raised to {damping:g}")
            others |= solver.folded
            pack = partial(pack_block, solver.results, others, job.spec.bits, job.checkpoint.dtype)
            spent = {"seconds": time.perf_counter() - start, "stages": watch.seconds()}
            entry = {**spent, "layers": layers, "clips": solver.transforms.clips}
            if solver.channel_scales:
                entry["zfold"] = {site: found.summary() for site, found in solver.channel_scales.items()}
            if solver.output_error is not None:
                entry["output_error"] = solver.output_error
            beside.write(index, pack if ranks.rank == 0 else dict, entry, peak_memory_bytes=_peak(job, folder))
        trim()
        progress.advance(block=index)
    beside.finish()
    job.spec = replace(job.spec, clips=folder.clips())
    return full, quantized


def _show(progress: Progress, index: int, name: str, loss: float) -> None:
    progress.advance(0, block=index, layer=name, loss=loss)


def _groups(job: Job, folder: RunFolder, ends: Ends) -> Iterator[dict[str, Tensor]]:
    f = job.decoder.family
    first, last = ends.split(f)
    yield first
    job.buffers.release()
    for index in range(job.decoder.shape.blocks):
        job.ranks.tick()
        yield {f"{f.layers}.{index}.{name}": tensor for name, tensor in folder.read_block(index).items()}
    yield last
