"""The scales that are one for all tokens: of inputs in NVFP4 and static FP8, of keys and values in FP8.

They are what the largest number asks for, of each kind of layer's input, of a block's keys, of its values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...models.families import ALL_SITES
from ..online import float8
from ..online.directions import LeadingDirections
from ..online.transforms import InputTransform
from ..stored_scales import global_scale_of
from .block_output import transformed
from .context import BlockContext, BlockResult, Streams


@dataclass
class _Peak:
    """Stands in a quantizer's place, and lets pass what it sees."""

    peak: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel():
            self.peak = max(self.peak, float(x.abs().amax()))
        return x


def find_scales(context: BlockContext, streams: Streams) -> tuple[BlockContext, BlockResult]:
    """Find these scales, in the block of full precision.

    Returns:
        The context that further steps go on in, and the scales, by the names of tensors; where none is wanted, the
        context as it is.
    """
    transforms, device, ranks = context.transforms, context.decoder.device, context.share.ranks
    named = [site for site in ALL_SITES if getattr(transforms, site).scale_name is not None]
    wanted = [site for site in named if not isinstance(getattr(transforms, site).quantizer, LeadingDirections)]
    cached = list(transforms.attention.scale_names)
    if not wanted and not cached:
        return context, BlockResult()
    peaks = {name: _Peak() for name in (*ALL_SITES, *cached)}
    # In the place of quantizers, so that rotations are those that the block is run with, and centers and sinks too.
    seen = {site: InputTransform(getattr(transforms, site).rotation, peaks[site]) for site in ALL_SITES}  # type: ignore[arg-type]
    parts = {part: peaks.get(part) for part in ("key", "value")}
    looking = replace(transforms, **seen, attention=replace(transforms.attention, **parts))  # type: ignore[arg-type]
    with transformed(context.decoder, context.full, looking):
        for batch in context.batches(streams):
            context.decoder.run(context.full, batch.full)
    for site in wanted:
        transform, peak = getattr(transforms, site), max(ranks.gather(peaks[site].peak))
        eight = transform.quantizer.format == "fp8"
        scale = float8.scale_of(peak) if eight else min(max(global_scale_of(peak), 2.0**-14), 2.0**15)  # fits float16
        transforms = transforms.with_input(site, transform.scaled(torch.tensor([scale], device=device)))
    found = {
        name: torch.tensor([float8.scale_of(max(ranks.gather(peaks[part].peak)))], device=device)
        for part, name in transforms.attention.scale_names.items()
    }
    transforms = replace(transforms, attention=transforms.attention.calibrated(found.get))
    return replace(context, transforms=transforms), BlockResult(centers=transforms.scales(context.family))
