"""A block that is known by its linear layers alone: one group of layers with the same input after another.

The block runs as it is, in both streams, and stops where a group reads its input. Each group is given what those before
it make of the quantized stream. Nothing is known of what the layers feed, so all of them have the objective of a layer.
Experts are known for what they are: each is calibrated on its own tokens, as those of a row are.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ...models.decoder import Decoder
from ..objective.statistics import InputStatistics
from .context import BlockContext, BlockResult, Streams
from .experts_step import quantize_alone
from .forward_parts import capture, capture_all
from .solving import alike, solve_layers


def quantize_plain(context: BlockContext, streams: Streams) -> BlockResult:
    """All linear layers, group after group; both streams move through the block."""
    found, family = BlockResult(), context.family
    of_experts = {name for i in family.all_experts for name in family.expert(i)}
    first = next((group for group in family.groups if group[0] in of_experts), None)
    for group in family.groups:
        if group[0] in of_experts:
            if group is first:  # all of them together
                found |= _quantize_experts(context, streams)
            continue
        inputs = context.share.total(InputStatistics)
        for batch in context.batches(streams) if context.previous is None else ():
            given = _input(context.decoder, context.quantized, group[0], batch.quantized)
            wanted = _input(context.decoder, context.full, group[0], batch.full) if context.follows_full else None
            inputs.at(batch.number).add(wanted, given)
        found |= solve_layers(context, *alike(context, group, inputs))
    for batch in context.batches(streams):
        streams.quantized[batch.span] = context.decoder.run(context.quantized, batch.quantized).to(
            streams.quantized.device
        )
        if context.follows_full:
            streams.full[batch.span] = context.decoder.run(context.full, batch.full).to(streams.full.device)
    return found


def _quantize_experts(context: BlockContext, streams: Streams) -> BlockResult:
    """All experts, each on the tokens that the quantized stream sends to it."""
    name, run = str(context.family.experts), context.decoder.run
    given = Streams(*(context.empty(*streams.full.shape, dtype=streams.full.dtype) for _ in range(2)))
    chosen: list[tuple[Tensor, Tensor]] = []
    for batch in context.batches(streams):
        full = capture(context.full.get_submodule(name), partial(run, context.full, batch.full))
        quantized, index, weights = capture_all(
            context.quantized.get_submodule(name), partial(run, context.quantized, batch.quantized)
        )
        given.full[batch.span], given.quantized[batch.span] = full.view_as(batch.full), quantized.view_as(batch.full)
        chosen.append((index.to(streams.full.device), weights.to(streams.full.device)))
    indices, weights_of = zip(*chosen, strict=True)
    return quantize_alone(context, given, torch.cat(indices), torch.cat(weights_of))


def _input(decoder: Decoder, block: nn.Module, layer: str, hidden: Tensor) -> Tensor:
    """What `layer` reads in a run of the block over `hidden`, (batch, length, columns)."""
    return capture(block.get_submodule(layer), partial(decoder.run, block, hidden))
