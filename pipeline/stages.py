"""The stages of a run: check, calibrate, quantize block by block, export, evaluate, report."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..boa.attention import NAME
from ..boa.block import BlockQuantizer
from ..boa.rounding import Settings
from ..boa.statistics import InputStatistics
from ..errors import InputError, RunError
from ..eval.perplexity import perplexity
from ..export.checkpoint import read_ends, write_native
from ..export.native import pack_block, packed_block, unpack_block
from ..export.spec import Spec
from ..models.aliases import ResolvedModel, resolve_model
from ..models.checkpoint import Checkpoint, fetch
from ..models.decoder import Decoder
from ..rotation.rotate import Rotations
from . import baseline
from .calibration import Split, calibration_tokens, evaluation_tokens, load_texts
from .progress import Progress
from .recipe import Recipe, recipe_to_yaml
from .run import (
    REPORT,
    RunFolder,
    device_of,
    recipe_of,
    write_json,
)

VERSIONED = ("rotoboa", "torch", "transformers", "safetensors", "tokenizers", "numpy")


@dataclass
class Job:
    """Everything that a run stands on, checked before any long work."""

    recipe: Recipe
    model: ResolvedModel
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    decoder: Decoder
    rotations: Rotations
    spec: Spec
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        """Of the rounding, as the recipe has them."""
        return Settings(**self.recipe.weights.model_dump(exclude={"head"}))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of a stage to `seconds`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.decoder.device.type == "cuda":
                torch.cuda.synchronize(self.decoder.device)
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def prepare(recipe: Recipe, device: str | None = None) -> Job:
    """Resolve and check a recipe.

    Raises:
        InputError: the model, its files, the sizes or the device do not fit the recipe.
    """
    target = device_of(device)
    model = resolve_model(recipe.model)
    checkpoint = Checkpoint(fetch(model.source, model.is_local))
    decoder = Decoder(checkpoint.config, attention=NAME, device=target)
    checkpoint.check(decoder.shapes)
    _check_sizes(recipe, decoder, model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{checkpoint.folder} has no tokenizer that can be read: copy its files there.") from error
    rotation = recipe.rotation
    rotations = Rotations.of(
        decoder.shape, r1=rotation.r1, r2=rotation.r2, r3=rotation.r3, r4=rotation.r4, seed=rotation.seed
    )
    spec = Spec(
        bits=recipe.weights.bits,
        group_size=recipe.weights.group_size,
        symmetric=recipe.weights.symmetric,
        r1=rotation.r1,
        r2=rotation.r2,
        r3=rotation.r3,
        r4=rotation.r4,
        activation_bits=recipe.activations.bits,
        activation_symmetric=recipe.activations.symmetric,
        activation_clip=recipe.activations.clip,
        key_bits=recipe.cache.key_bits,
        value_bits=recipe.cache.value_bits,
        cache_clip=recipe.cache.clip,
    )
    return Job(recipe, model, checkpoint, tokenizer, decoder, rotations, spec)


def _check_sizes(recipe: Recipe, decoder: Decoder, model: ResolvedModel) -> None:
    shape, group = decoder.shape, recipe.weights.group_size
    widths = {"hidden size": shape.hidden, "attention width": shape.query_heads * shape.head_dim, "ffn size": shape.ffn}
    for name, width in widths.items():
        if group and width % group:
            fitting = [g for g in (32, 64, 128, 16, 8) if all(w % g == 0 for w in widths.values())]
            hint = f"one of {', '.join(map(str, fitting))}" if fitting else "none (one scale per channel)"
            raise InputError(
                f"weights.group_size {group} does not divide the {name} {width} of {model.name}: give {hint}."
            )
    _check_length(_length(recipe, model, decoder), decoder, model, "calibration.sequence_length")


def _check_length(length: int, decoder: Decoder, model: ResolvedModel, option: str) -> None:
    most = getattr(decoder.config, "max_position_embeddings", None)
    if most and length > most:
        raise InputError(f"{option} {length} is more than the {most} positions of {model.name}: give at most {most}.")


def _length(recipe: Recipe, model: ResolvedModel, decoder: Decoder) -> int:
    """The recipe's sequence length, else the model's default, cut to the positions that it has."""
    if recipe.calibration.sequence_length:
        return recipe.calibration.sequence_length
    most = getattr(decoder.config, "max_position_embeddings", None) or model.sequence_length
    return min(model.sequence_length, most)


def _dataset(given: str | None, model: ResolvedModel, option: str) -> str:
    dataset = given or model.dataset
    if dataset is None:
        raise InputError(
            f"{model.name} is a local folder, which has no default text: "
            f"give {option} wikitext2 (a download), or a .txt or .jsonl file."
        )
    return dataset


def _evaluation_windows(job: Job, dataset: str, split: Split, length: int, windows: int | None) -> Tensor:
    texts = load_texts(dataset, split)
    limit = windows if windows is not None else job.model.windows
    return evaluation_tokens(job.tokenizer, texts, length, limit, job.decoder.shape.vocabulary)


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
    folder = RunFolder(recipe.output, _identity(job))
    folder.need_space(2 * _exported_bytes(job) + 2**24)
    length = _length(recipe, job.model, job.decoder)
    calibration_set = _dataset(recipe.calibration.dataset, job.model, "--calibration.dataset")
    evaluation_set = _dataset(recipe.evaluation.dataset, job.model, "--evaluation.dataset")
    with job.timed("text"):
        tokens = calibration_tokens(
            job.tokenizer,
            load_texts(calibration_set, "calibration"),
            recipe.calibration.samples,
            length,
            recipe.calibration.seed,
            job.decoder.shape.vocabulary,
        )
        windows = _evaluation_windows(job, evaluation_set, recipe.evaluation.split, length, recipe.evaluation.windows)
    folder.start(recipe_to_yaml(recipe))

    try:
        embedding, norm, head = _ends(job)
        plain = _plain_forward(job, tokens, progress)
        with job.timed("quantize"):
            streams = _quantize_blocks(job, folder, tokens, embedding, progress)
            head = _correct_head(job, norm, head, *streams)
        with job.timed("export"):
            write_native(folder.path / "model", job.checkpoint, job.spec, _groups(job, folder, embedding, norm, head))
        measured = _evaluate(job, folder, windows, (embedding, norm, head), progress)
    except (ValueError, RuntimeError, ArithmeticError, MemoryError, OSError, SafetensorError) as error:
        what = str(error).rstrip(".") or type(error).__name__
        raise RunError(
            f"the run in {folder.path} failed: {what}; the same command goes on from its last block."
        ) from error
    report = {
        "model": job.model.name,
        "perplexity": {evaluation_set: measured},
        "tokens": {"calibration": list(tokens.shape), "evaluation": list(windows.shape)},
        "seconds": {**job.seconds, "total": time.perf_counter() - started},
        "plain_forward_seconds": plain,
        "peak_memory_bytes": _peak_memory(job.decoder.device),
        "sizes": _sizes(job, folder),
        "versions": folder.manifest["identity"]["versions"],
        "python": platform.python_version(),
        "device": _device_name(job.decoder.device),
        "recipe": recipe.model_dump(mode="json"),
        "seeds": {"rotation": recipe.rotation.seed, "calibration": recipe.calibration.seed},
    }
    write_json(folder.path / REPORT, report)
    folder.manifest["finished"] = True
    folder.save()
    return report


def evaluate(
    run: Path,
    *,
    dataset: str | None = None,
    windows: int | None = None,
    sequence_length: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the perplexity of a finished run again, on this or another text; returns a report of it.

    Raises:
        InputError: there is no finished run, or the text cannot be used.
    """
    progress = progress or Progress(quiet=True)
    folder = RunFolder.open(run)
    recipe = recipe_of(run).model_copy(update={"output": run})
    job = prepare(recipe, device)
    length = sequence_length or _length(recipe, job.model, job.decoder)
    _check_length(length, job.decoder, job.model, "--sequence-length")
    chosen = dataset or _dataset(recipe.evaluation.dataset, job.model, "--dataset")
    tokens = _evaluation_windows(job, chosen, recipe.evaluation.split, length, windows or recipe.evaluation.windows)
    job.spec = replace(job.spec, clips=folder.clips())
    measured = _evaluate(job, folder, tokens, read_ends(run / "model", job.decoder.family), progress)
    return {"perplexity": {chosen: measured}, "seconds": job.seconds, "sizes": _sizes(job, folder)}


def _identity(job: Job) -> dict[str, Any]:
    """What must be the same for a run to go on: recipe, checkpoint, and the versions that compute."""
    files = sorted({*job.checkpoint.files, job.checkpoint.folder / "config.json"})
    return {
        "recipe": job.recipe.model_dump(mode="json", exclude={"output"}),
        "checkpoint": {file.name: file.stat().st_size for file in files},
        "versions": {name: version(name) for name in VERSIONED},
    }


def _ends(job: Job) -> tuple[Tensor, Tensor, Tensor]:
    """Embedding, final norm and head, rotated, in the checkpoint's dtype: what is stored is what is measured."""
    c, dtype = job.checkpoint, job.checkpoint.dtype
    embedding = job.rotations.rotate_embedding(c.embedding()).to(dtype)
    head, norm = job.rotations.rotate_head(c.head(), c.final_norm(), job.decoder.family)
    return embedding, norm.to(dtype), head.to(dtype)


def _plain_forward(job: Job, tokens: Tensor, progress: Progress) -> float:
    """Seconds of one plain forward pass over the calibration set: the measure that ratios are taken to."""
    progress.stage("plain forward pass", job.decoder.shape.blocks)
    compute = job.decoder
    hidden = job.checkpoint.embedding()[tokens].to(compute.dtype)
    seconds = 0.0
    with torch.no_grad():
        for index in range(compute.shape.blocks):
            block = compute.block(index, job.checkpoint.block(index))
            start = time.perf_counter()
            for part in hidden.split(job.recipe.calibration.batch):
                part.copy_(compute.run(block, part.to(compute.device)))
            if compute.device.type == "cuda":
                torch.cuda.synchronize(compute.device)
            seconds += time.perf_counter() - start
            progress.advance()
    return seconds


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


def _evaluate(
    job: Job, folder: RunFolder, windows: Tensor, ends: tuple[Tensor, Tensor, Tensor], progress: Progress
) -> dict[str, float]:
    """Perplexity of full precision, of RTN without rotation and of the quantized model, on the same windows."""
    compute, checkpoint = job.decoder, job.checkpoint
    plain_ends = (checkpoint.embedding(), checkpoint.final_norm(), checkpoint.head())
    transforms = replace(job.spec, r3=False, r4=False, clips=None).transforms(compute.shape)

    def run(blocks: Iterator[torch.nn.Module], ends: tuple[Tensor, Tensor, Tensor], name: str) -> float:
        progress.stage(f"evaluate {name}", compute.shape.blocks)
        embedding, norm, head = ends
        functions = (partial(compute.run, block) for block in blocks)
        return perplexity(
            windows,
            embedding.to(compute.device, compute.dtype),
            functions,
            compute.norm(norm),
            head.to(compute.device, compute.dtype),
            batch=job.recipe.calibration.batch,
            advance=progress.advance,
        )

    indices = range(compute.shape.blocks)
    measured = {}
    with job.timed("evaluate full precision"):
        plain = (compute.block(i, checkpoint.block(i)) for i in indices)
        measured["full_precision"] = run(plain, plain_ends, "full precision")
    if job.recipe.evaluation.baseline:
        with job.timed("evaluate rtn"):
            rounded = (baseline.block(compute, i, checkpoint.block(i), job.settings, transforms) for i in indices)
            measured["rtn"] = run(rounded, plain_ends, "rtn")
    with job.timed("evaluate quantized"):
        packed = (packed_block(compute, i, folder.read_block(i), job.spec) for i in indices)
        measured["quantized"] = run(packed, ends, "quantized")
    return measured


def _exported_bytes(job: Job) -> int:
    """An upper estimate of the model folder."""
    s = job.decoder.shape
    weights = s.hidden * (2 * s.query_heads * s.head_dim + 2 * s.key_heads * s.head_dim + 3 * s.ffn)
    scales = 3 * weights // (job.spec.group_size or min(s.hidden, s.ffn, s.query_heads * s.head_dim))
    return (
        s.blocks * (weights * job.spec.bits // 8 + scales) + 2 * s.vocabulary * s.hidden * job.checkpoint.dtype.itemsize
    )


def _sizes(job: Job, folder: RunFolder) -> dict[str, int]:
    exported = folder.path / "model"
    files = exported.glob("*.safetensors")
    return {"original": job.checkpoint.bytes, "quantized": sum(file.stat().st_size for file in files)}


def _peak_memory(device: torch.device) -> dict[str, int]:
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads of {os.cpu_count()}"
