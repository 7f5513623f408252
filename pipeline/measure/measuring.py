"""What is measured of a run: perplexities, divergence, the plain forward pass of ratios, memory, sizes."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from ...boa.precision import quick_products
from ...boa.solver.rounding import Quantized, quantize
from ...boa.stopwatch import STAGES
from ...boa.stored_scales import global_scale_of
from ...eval.perplexity import ORIGINAL, States, last_states, part_sums, summary
from ...eval.results import Divergences, Perplexities
from ...export.packing import ALL_PARTS, pack_block
from ...export.runtime.memory import memory
from ...export.runtime.prepared import packed_block, prepare_block
from ...models.outer_layers import OuterLayers
from ..console.progress import Progress, peak_resident
from ..console.sizes import exported_sizes, part_sizes
from ..job.job import Job
from ..job.sharing import own_share, own_windows, shared_block
from ..storage.buffers import trim
from ..storage.files import tensor_sizes
from ..storage.manifest import BlockEntry
from ..storage.run_folder import RunFolder
from ..storage.run_report import Held, Memory, Sizes


class Onlooker(Protocol):
    """Sees the blocks of the plain forward pass, and the stream of the first `sequences` of all."""

    sequences: int

    def add(self, index: int, tensors: Mapping[str, Tensor], block: nn.Module, hidden: Tensor) -> None:
        """Block `index` of the checkpoint, its `tensors`, and the stream (sequences, length, hidden) at its start."""


def plain_forward(job: Job, tokens: Tensor, progress: Progress, onlookers: Sequence[Onlooker] = ()) -> float:
    """Seconds of one plain forward pass over the calibration set: the measure that ratios are taken to.

    `onlookers` see each block on the way; their seconds do not count. Of several ranks the slowest counts.
    """
    progress.stage("plain forward pass", job.decoder.shape.blocks)
    compute, share = job.decoder, own_share(job, len(tokens))
    tokens = tokens[share.start : max(share.stop, *(onlooker.sequences for onlooker in onlookers), 0)]
    outer = job.checkpoint.outer_layers()
    hidden = job.buffers.empty(*tokens.shape, compute.shape.hidden, dtype=compute.dtype)
    for part, ids in zip(
        hidden.split(job.recipe.calibration.batch), tokens.split(job.recipe.calibration.batch), strict=True
    ):
        part.copy_(compute.embed(outer, ids))
    seconds = 0.0
    with torch.no_grad(), quick_products(compute.device):  # as the quantizer's own passes are
        for index in range(compute.shape.blocks):
            tensors = job.checkpoint.block(index)
            block = compute.block(index, tensors)
            for onlooker in onlookers:
                onlooker.add(index, tensors, block, hidden)
                job.ranks.tick()
            start = time.perf_counter()
            for part in hidden.split(job.recipe.calibration.batch):
                part.copy_(compute.run(block, part.to(compute.device)))
                job.release()
            if compute.device.type == "cuda":
                torch.cuda.synchronize(compute.device)
            seconds += time.perf_counter() - start
            trim()
            progress.advance()
    return float(max(job.ranks.gather(seconds)))


def perplexities(
    job: Job, folder: RunFolder, texts: Mapping[str, Tensor], outer: OuterLayers, progress: Progress
) -> tuple[dict[str, Perplexities], dict[str, Divergences]]:
    """Full precision, RTN without rotation and the quantized model on the same texts, each run through them once.

    Args:
        job, folder: the run; its blocks are finished.
        texts: (windows, length) tokens by the name of the data set.
        ends: what is outside the blocks of the quantized model.
        progress: told of each block.

    Returns:
        Perplexities, and divergences from full precision, by data set.
    """
    original = job.checkpoint.outer_layers()
    found = {name: _perplexities(job, folder, text, original, outer, progress) for name, text in texts.items()}
    return {name: perplexity for name, (perplexity, _) in found.items()}, {
        name: far for name, (_, far) in found.items()
    }


def _perplexities(
    job: Job,
    folder: RunFolder,
    windows: Tensor,
    outer_of_original: OuterLayers,
    outer: OuterLayers,
    progress: Progress,
) -> tuple[Perplexities, Divergences]:
    compute, checkpoint = job.decoder, job.checkpoint
    share = own_windows(job, len(windows))
    own = windows[share.start : share.stop]

    def advance() -> None:
        trim()
        progress.advance()
        job.ranks.tick()

    def states(name: str, blocks: Iterator[nn.Module], outer: OuterLayers) -> States:
        progress.stage(f"evaluate {name}", compute.shape.blocks)
        with job.timed(f"evaluate {name}"):
            return last_states(
                own,
                partial(compute.embed, outer),
                (partial(compute.run, block) for block in blocks),
                compute.logits(outer),
                batch=job.recipe.calibration.batch,
                device=compute.device,
                advance=advance,
                empty=job.buffers.empty,
                release=job.release,
            )

    indices, models = range(compute.shape.blocks), {}
    original = states("full precision", (compute.block(i, checkpoint.block(i)) for i in indices), outer_of_original)
    if job.recipe.evaluation.baseline:
        rounded = (rounded_block(job, i) for i in indices)
        models["rtn"] = states("rtn", rounded, outer_of_original)
    packed = (packed_block(compute, i, shared_block(job, folder, i), job.spec) for i in indices)
    models["quantized"] = states("quantized", packed, outer)
    with job.timed("evaluate logits"):
        sums = job.ranks.gather(part_sums(own, models, original, advance=job.ranks.tick))
    found = {
        name: summary([part for rank in sums for part in rank[name]], windows.numel() - len(windows), True)
        for name in (ORIGINAL, *models)
    }
    far = {name: asdict(distance) for name, (_, distance) in found.items() if distance is not None}
    perplexity = Perplexities(full_precision=found[ORIGINAL][0], **{name: found[name][0] for name in models})
    of_rtn = {"rtn": far["rtn"]} if "rtn" in models else {}
    return perplexity, Divergences.model_validate({**far["quantized"], **of_rtn})


def rounded_block(job: Job, index: int) -> nn.Module:
    """Block `index` of the original checkpoint, every projection rounded to nearest, with the quantizers of the run."""
    decoder, family, spec = job.decoder, job.decoder.family.at(index), job.spec.unrotated
    tensors, schemes, rtn = job.checkpoint.block(index), spec.schemes(family, index), job.settings.but(method="rtn")
    results = {}
    for name, scheme in schemes.items():
        if scheme.weights.quantizes:
            weight = tensors[f"{name}.weight"].float()
            settings = rtn.of(scheme.weights, global_scale_of(float(weight.abs().amax())))
            found = quantize(weight[None], None, settings)
            results[name] = Quantized(found.integers[0], found.scale[0], found.zero[0])
            results[name].global_scale = settings.global_scale
    transforms = spec.transforms(decoder.shape, family, index)
    module = prepare_block(decoder.empty_block(index), family, schemes, transforms)
    others = {**tensors, **transforms.scales(family)}
    return decoder.block(index, pack_block(results, others, schemes, decoder.dtype), module)


def sizes(job: Job, folder: RunFolder) -> Sizes:
    """Bytes of the tensor files before and after, and of the parts of the finished model."""
    exported = folder.path / "model"
    files = exported.glob("*.safetensors")
    parts = part_sizes(exported_sizes(exported), job.decoder)
    return Sizes(original=job.checkpoint.bytes, quantized=sum(file.stat().st_size for file in files), **parts)


def loaded(job: Job, tokens: int, *, tied: bool) -> Memory:
    """Bytes that the loaded model holds, `tied` or not, and its cache of `tokens` tokens, beside those in bfloat16."""
    held = memory(job.decoder, job.spec, job.checkpoint.dtype, tokens, tied=tied)
    return Memory(model=Held(**held["model"]), cache=Held(**held["cache"]))


def bits_per_weight(job: Job, folder: RunFolder) -> float:
    """Bits that a weight of a block's projections takes as it is stored, scales, zero points and padding included."""
    stored = weights = 0
    for index in range(job.decoder.shape.blocks):
        sizes, block = tensor_sizes(folder.block_path(index)), job.decoder.empty_block(index)
        for name in job.decoder.family.at(index).projections:
            stored += sum(sizes.get(f"{name}.{part}", 0) for part in ("weight", *ALL_PARTS))
            weights += block.get_parameter(f"{name}.weight").numel()
    return 8 * stored / weights


def fallback_notices(blocks: Iterable[BlockEntry]) -> list[str]:
    """A sentence for each block of the manifest with experts that saw too few tokens."""
    notices = []
    for block in blocks:
        few = {n: found.fallback_tokens for n, found in block.layers.items() if found.fallback_tokens is not None}
        if few:
            seen = ", ".join(f"{name} ({count})" for name, count in few.items())
            notices.append(
                f"Block {block.index}: experts that saw fewer tokens than they have input channels were calibrated "
                f"on tokens of the whole layer: {seen}."
            )
    return notices


def raised_damping(blocks: Iterable[BlockEntry]) -> dict[str, float]:
    """Layers whose Cholesky decomposition needed more damping than the recipe has, by block and name."""
    return {
        f"{block.index}.{name}": layer.damping
        for block in blocks
        for name, layer in block.layers.items()
        if layer.damping is not None
    }


def stage_seconds(blocks: Sequence[BlockEntry]) -> dict[str, float]:
    """Seconds by stage of the quantizer, of all blocks."""
    return {name: sum(block.stages.get(name, 0.0) for block in blocks) for name in STAGES}


def peak_so_far(job: Job, folder: RunFolder) -> dict[str, int]:
    """The most memory that any part of the run has held so far on any rank."""
    earlier = folder.manifest.peak_memory_bytes
    now = job.ranks.gather({**peak_memory(job.decoder.device), "spilled": job.buffers.peak})
    return {name: max(earlier.get(name, 0), *(held[name] for held in now)) for name in now[0]}


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most memory held so far, in bytes, of this process and of the device."""
    peak = {"host": peak_resident() or 0}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def device_name(device: torch.device) -> str:
    """What computed, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads of {os.cpu_count()}"
