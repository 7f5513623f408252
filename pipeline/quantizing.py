"""Quantizing block by block: each is read, rotated, solved and packed, while both streams go through it."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from torch import Tensor

from ..boa.block.block import quantize_block
from ..boa.block.context import BlockContext, BlockResult, Share, Streams, needs_full, shared_copy
from ..boa.stopwatch import Stopwatch, stage
from ..errors import RunError
from ..export.packing import pack_block, unpack_block
from ..models.outer_layers import OuterLayers
from .console.progress import Progress
from .job.job import Job
from .job.sharing import own_share, shared_block
from .measure.measuring import peak_so_far
from .recipe.settings import moves_head
from .storage.buffers import trim
from .storage.manifest import BlockEntry
from .storage.prefetch import Prefetcher
from .storage.run_writer import FollowedRun


def quantize_blocks(
    job: Job, folder: FollowedRun, tokens: Tensor, outer: OuterLayers, progress: Progress, prefetcher: Prefetcher
) -> tuple[Tensor, Tensor]:
    """Every block that is not finished yet; returns both streams as they leave the last one."""
    compute, family, ranks, share = job.decoder, job.decoder.family, job.ranks, own_share(job, len(tokens))
    tokens = tokens[share.start : share.stop]
    follows = needs_full(job.settings, family) or moves_head(job.recipe)
    full = job.buffers.empty(*tokens.shape, compute.shape.hidden, dtype=compute.dtype)
    quantized = job.buffers.empty(*full.shape, dtype=compute.dtype) if follows else full
    for i in range(len(tokens)):
        full[i] = quantized[i] = compute.embed(outer, tokens[i : i + 1])[0]
    finished = len(folder.manifest.blocks)
    progress.stage("quantize", compute.shape.blocks)
    for index in range(compute.shape.blocks):
        start = time.perf_counter()
        watch = Stopwatch(compute.device)
        with watch, stage("rotation"):
            rotated = job.rotations.rotate_block(prefetcher.block(index), family, index)
        previous, schemes = None, job.spec.schemes(family, index)
        if index < finished:
            columns = {name: rotated[f"{name}.weight"].shape[1] for name in schemes}
            previous = unpack_block(shared_block(job, folder, index), schemes, columns)
        block = compute.block(index, rotated)
        projections = {f"{name}.weight" for name in schemes}
        others = {name: tensor for name, tensor in rotated.items() if name not in projections}
        del rotated  # in float64 it is twice as large as the block
        with watch, stage("forward"):
            own = Share.of(ranks, len(full), job.recipe.calibration.batch)
        context = BlockContext(
            compute,
            block,
            shared_copy(block),
            job.settings,
            job.spec.transforms(compute.shape, family, index),
            own,
            previous=previous,
            references=job.recipe.evaluation.references and previous is None,
            report=partial(_show, progress, index),
            empty=job.buffers.empty,
            release=job.release,
            follows_full=follows,
            schemes=schemes,
        )
        try:
            with watch:
                found = quantize_block(context, Streams(full, quantized))
        except ValueError as error:
            raise RunError(f"block {index}, {error}: look for NaN, Inf or huge values in the checkpoint.") from error
        if previous is None:
            for name, damping in found.damping.items():
                progress.log(f"block {index}, {name}: Cholesky failed; damping raised to {damping:g}")
            others |= found.folded | found.centers
            left = [f"{name}.weight" for name, scheme in schemes.items() if not scheme.weights.quantizes]
            others |= {name: block.get_parameter(name).data for name in left}
            pack = partial(pack_block, found.results, others, schemes, job.checkpoint.dtype, family.exact)
            spent = {"seconds": time.perf_counter() - start, "stages": watch.seconds()}
            entry = BlockEntry.model_validate({"index": index, **spent, **_told(found)})
            prefetcher.write(
                index, pack if ranks.rank == 0 else dict, entry, peak_memory_bytes=peak_so_far(job, folder)
            )
        trim()
        progress.advance(block=index)
    prefetcher.finish()
    return full, quantized


def _told(found: BlockResult) -> dict[str, Any]:
    """What the manifest says of a block that was quantized: losses by layer, what was out of the way."""
    layers: dict[str, dict[str, Any]] = {name: {"loss": loss} for name, loss in found.losses.items()}
    for key, values in (
        ("objective", found.objectives),
        ("fallback_tokens", found.fallbacks),
        ("damping", found.damping),
    ):
        for name, value in values.items():
            layers[name][key] = value
    entry: dict[str, Any] = {"layers": layers}
    if found.channel_scales:
        entry["zfold"] = {site: scales.summary() for site, scales in found.channel_scales.items()}
    if found.output_error is not None:
        entry["output_error"] = found.output_error
    return entry


def _show(progress: Progress, index: int, name: str, loss: float) -> None:
    progress.advance(0, block=index, layer=name, loss=loss)
