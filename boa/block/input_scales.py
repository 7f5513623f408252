"""The global scales of inputs in NVFP4: what the largest number of each kind of layer's input asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...models.families import ALL_SITES
from ..online.attention import AttentionTransform
from ..online.transforms import INPUT_SCALE, InputTransform
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


def scale_inputs(context: BlockContext, streams: Streams) -> tuple[BlockContext, BlockResult]:
    """Find the global scales of the inputs that are NVFP4, in the block of full precision.

    Returns:
        The context that further steps go on in, and the scales, by projection; where none is wanted, the context as it
        is.
    """
    transforms, family = context.transforms, context.family
    wanted = [site for site in ALL_SITES if getattr(transforms, site).needs_scale]
    if not wanted:
        return context, BlockResult()
    peaks = {site: _Peak() for site in ALL_SITES}
    # In the place of quantizers, so that rotations are those that the block is run with.
    seen = {site: InputTransform(getattr(transforms, site).rotation, peaks[site]) for site in ALL_SITES}  # type: ignore[arg-type]
    looking = replace(transforms, **seen, attention=AttentionTransform(transforms.attention.rotation))  # type: ignore[arg-type]
    with transformed(context.decoder, context.full, looking):
        for batch in context.batches(streams):
            context.decoder.run(context.full, batch.full)
    found: dict[str, torch.Tensor] = {}
    for site in wanted:
        scale = global_scale_of(max(context.share.ranks.gather(peaks[site].peak)))
        tensor = torch.tensor([min(max(scale, 2.0**-14), 2.0**15)], device=context.decoder.device)  # fits float16
        transforms = transforms.with_input(site, getattr(transforms, site).scaled(tensor))
        found |= {f"{name}.{INPUT_SCALE}": tensor for name, own in family.sites.items() if own == site}
    return replace(context, transforms=transforms), BlockResult(centers=found)
