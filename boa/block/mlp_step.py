"""The MLP of a block: gate and up, or up alone; down."""

from __future__ import annotations

from ..objective.statistics import InputStatistics
from .context import BlockContext, BlockResult, Streams
from .forward_parts import mlp_hidden
from .residual_stream import Writer, add_given, write_full, write_quantized
from .solving import Layers, layer_objective, solve_layers


def quantize_mlp(context: BlockContext, streams: Streams, before: Streams | None = None) -> BlockResult:
    """Gate and up, then down.

    Args:
        context: of the block.
        streams: what the output is added to, in place.
        before: what the MLP's norm reads, where that is not the same: attention and MLP stand side by side, and these
            are the streams before attention.
    """
    f, t, share = context.family, context.transforms, context.share
    read = streams if before is None else before
    norm, readers = context.full.get_submodule(f.mlp_norm), list(f.mlp_inputs)
    inputs, downs = share.total(InputStatistics), share.total(InputStatistics)
    if context.previous is None:
        for batch in context.batches(read):
            xf = t.gate_up.rotate(norm(batch.full)) if context.follows_full else None
            inputs.at(batch.number).add(xf, t.gate_up(norm(batch.quantized)))
    found = solve_layers(context, Layers(readers, layer_objective(inputs), [1] * len(readers)))

    down = Writer(f.down, f.mlp_post_norm)
    given = context.empty(*read.full.shape[:2], context.shape.ffn, dtype=read.full.dtype)
    for batch in context.batches(read):
        given[batch.span] = x = t.down(mlp_hidden(f, context.quantized, t.gate_up(norm(batch.quantized))))
        target = batch if before is None else context.batch(streams, batch.span)
        if not context.follows_full:
            add_given(context, downs, target, x)
            continue
        exact = t.down.rotate(mlp_hidden(f, context.full, t.gate_up.rotate(norm(batch.full))))
        write_full(context, down, downs, streams, target, exact, x)
    found |= solve_layers(context, Layers([f.down], layer_objective(downs, context.weight(f.down)), [1]))
    write_quantized(context, down, streams, given)
    return found
