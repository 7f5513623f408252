"""What stands in the place of attention in some blocks: a linear recurrence, a convolution.

Its linear layers have the objective of a layer: those that read the norm first, then the one that writes to the stream.
What is between them runs as it is, in full precision.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from ..objective.statistics import InputStatistics
from ..online.transforms import OnlineTransforms
from .block_output import transformed
from .context import BlockContext, BlockResult, Streams
from .forward_parts import capture
from .residual_stream import Writer, add_given, write_full, write_quantized
from .solving import Layers, alike, layer_objective, solve_layers


def quantize_mixer(context: BlockContext, streams: Streams) -> BlockResult:
    """The layers that read the norm, then the output; both streams move through them."""
    f, t, share = context.family, context.transforms, context.share
    norm, inputs = context.full.get_submodule(f.attention_norm), share.total(InputStatistics)
    if context.previous is None:
        for batch in context.batches(streams):
            xf = t.qkv.rotate(norm(batch.full)) if context.follows_full else None
            inputs.at(batch.number).add(xf, t.qkv(norm(batch.quantized)))
    found = solve_layers(context, *alike(context, f.mixed, inputs))

    writer, outputs = Writer(f.output, f.attention_post_norm), share.total(InputStatistics)
    width = context.weight(f.output).shape[1]
    given = context.empty(*streams.full.shape[:2], width, dtype=streams.full.dtype)
    for batch in context.batches(streams):
        given[batch.span] = x = _mixed(context, context.quantized, t, batch.quantized)
        if not context.follows_full:
            add_given(context, outputs, batch, x)
            continue
        exact = _mixed(context, context.full, t.without_quantizers, batch.full)
        write_full(context, writer, outputs, streams, batch, exact, x)
    found |= solve_layers(context, Layers([f.output], layer_objective(outputs, context.weight(f.output)), [1]))
    write_quantized(context, writer, streams, given)
    return found


def _mixed(context: BlockContext, block: nn.Module, transforms: OnlineTransforms, hidden: Tensor) -> Tensor:
    """What the output layer computes with in a run of the block over `hidden`, (batch, length, columns)."""
    with transformed(context.decoder, block, transforms):
        return capture(block.get_submodule(context.family.output), partial(context.decoder.run, block, hidden))
