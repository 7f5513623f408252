"""The leading directions of a block's inputs, which `online.directions` keeps in eight bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..objective.statistics import InputStatistics
from ..online.directions import DIRECTED, LeadingDirections, leading
from .block_output import transformed
from .context import BlockContext, BlockResult, Streams


def find_directions(context: BlockContext, streams: Streams) -> tuple[BlockContext, BlockResult]:
    """Find these directions in the block of full precision, from inputs turned by what runs online.

    Rounding errs by a part of a token's size, and so each token counts relative to its own root mean square: the
    massive one at the start of a text would have them all.

    Returns:
        The context that further steps go on in, and the directions by the names of tensors; where none are wanted, the
        context as it is.
    """
    transforms, family = context.transforms, context.family
    wanted = [site for site in DIRECTED if isinstance(getattr(transforms, site).quantizer, LeadingDirections)]
    if not wanted:
        return context, BlockResult()
    first = {site: next(name for name in family.sites if family.sites[name] == site) for site in wanted}
    totals = {site: context.share.total(InputStatistics) for site in wanted}
    number = 0

    def look(site: str, turn: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = turn(args[0]).flatten(0, -2)
            tiny = torch.finfo(x.dtype).tiny
            totals[site].at(number).add(None, x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(tiny))

        return hook

    handles = []
    with transformed(context.decoder, context.full, transforms.without_quantizers):
        for site, name in first.items():
            if family.experts and site == "gate_up":  # of which one sees some of the tokens
                module, turn = context.full.get_submodule(family.mlp), getattr(transforms, site).rotate
            else:  # which comes after the rotation
                module, turn = context.full.get_submodule(name), lambda x: x
            handles.append(module.register_forward_pre_hook(look(site, turn)))
        try:
            for batch in context.batches(streams):
                number = batch.number
                context.decoder.run(context.full, batch.full)
        finally:
            for handle in handles:
                handle.remove()
    found = {}
    for site, name in first.items():
        transform = getattr(transforms, site)
        directions = leading(totals[site].value().objective().h_in[0], transform.quantizer.directions.shape[1])
        found[f"{name}.{transform.scale_name}"] = directions
        transforms = transforms.with_input(site, transform.scaled(directions))
    return replace(context, transforms=transforms), BlockResult(centers=found)
