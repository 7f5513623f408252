"""A block that is known by its linear layers alone: one group of layers with the same input after another.

The block runs as it is, in both streams, and stops where a group reads its input. Each group is given what those before
it make of the quantized stream. Nothing is known of what the layers feed, so all of them have the objective of a layer.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from ...models.decoder import Decoder
from ..objective.statistics import InputStatistics
from .context import BlockContext, BlockResult, Streams
from .forward_parts import capture
from .solving import alike, solve_layers


def quantize_plain(context: BlockContext, streams: Streams) -> BlockResult:
    """All linear layers, group after group; both streams move through the block."""
    found = BlockResult()
    for group in context.family.groups:
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


def _input(decoder: Decoder, block: nn.Module, layer: str, hidden: Tensor) -> Tensor:
    """What `layer` reads in a run of the block over `hidden`, (batch, length, columns)."""
    return capture(block.get_submodule(layer), partial(decoder.run, block, hidden))
