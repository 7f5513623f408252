"""The attention of a block: queries and keys; values; the output projection."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from ..objective.gate import GateStatistics
from ..objective.key_mean import KeyMean
from ..objective.statistics import AttentionStatistics, InputStatistics, value_stride
from ..objective.totals import Total
from ..online.attention import CENTER, AttentionInputs, AttentionTransform
from ..solver.rounding_settings import LAYERWISE
from .attention_objectives import (
    add_heads,
    gate_objective,
    norm_totals,
    query_key_objective,
    value_objective,
    weighted,
    without_bias,
)
from .context import Batch, BlockContext, BlockResult, Streams
from .forward_parts import attend, attend_ungated, attention_inputs
from .residual_stream import Writer, add_given, write_full, write_quantized
from .solving import Layers, layer_objective, solve_layers


def center_keys(context: BlockContext, streams: Streams) -> tuple[BlockContext, BlockResult]:
    """Find the mean of the keys that quantized queries will meet, and let keys be rounded without it.

    RoPE turns it away in pairs of channels that turn fast. What is left, in those that turn slowly and in a head's
    bias, is about half of a key's energy, and would take as much of the grid.

    Returns:
        The context that further steps go on in, and the center; where none is wanted, the context as it is.
    """
    t, norm = context.transforms, context.full.get_submodule(context.family.attention_norm)
    if not t.attention.centered or t.attention.center is not None:
        return context, BlockResult()
    means, plain = context.share.total(KeyMean), AttentionTransform(t.attention.rotation)
    for batch in context.batches(streams):
        seen = attention_inputs(context.decoder, context.quantized, t.qkv(norm(batch.quantized)), plain)
        means.at(batch.number).add(seen.key)
    # As any dtype of a checkpoint holds it, so that what is measured is what is stored.
    center = means.value().mean.flatten().bfloat16().to(streams.quantized.dtype)
    context = replace(context, transforms=replace(t, attention=replace(t.attention, center=center)))
    return context, BlockResult(centers={f"{context.family.attention}.{CENTER}": center})


def quantize_attention(context: BlockContext, streams: Streams) -> BlockResult:
    """Queries and keys, values, the output projection; both streams move through them."""
    size = (*streams.full.shape[:2], context.shape.query_heads * context.shape.head_dim)
    attended = context.empty(*size, dtype=streams.full.dtype)
    given = context.empty(*size, dtype=streams.full.dtype) if context.follows_full else attended
    found = _quantize_inputs(context, streams, attended)
    return found | _quantize_output(context, streams, attended, given)


def _quantize_inputs(context: BlockContext, streams: Streams, attended: Tensor) -> BlockResult:
    """Queries, keys and values; `attended` becomes the full-precision input of the output projection."""
    f, t, shape, share = context.family, context.transforms, context.shape, context.share
    norm, layerwise = context.full.get_submodule(f.attention_norm), context.settings.method in LAYERWISE
    inputs, norms = share.total(InputStatistics), norm_totals(context)
    gated, gate_inputs = share.total(partial(GateStatistics, shape.query_heads)), share.total(InputStatistics)
    grams, values = (share.total(partial(AttentionStatistics, t.attention.rotation)) for _ in range(2))
    for batch in context.batches(streams):
        xq = t.qkv(norm(batch.quantized))
        if not context.follows_full:
            if context.previous is None:
                inputs.at(batch.number).add(None, xq)
            continue
        xf = t.qkv.rotate(norm(batch.full))
        wanted, gate = attend_ungated(context.decoder, context.full, xf, AttentionTransform())
        attended[batch.span] = wanted if gate is None else wanted * gate
        if context.previous is None:
            inputs.at(batch.number).add(*weighted(context, norms, batch.number, xf, xq))
            if layerwise:
                continue
            if gate is not None:
                gated.at(batch.number).add(wanted, gate)
                gate_inputs.at(batch.number).add(xf, xq)
            seen = attention_inputs(context.decoder, context.quantized, xq, t.attention)
            add_heads(context, grams, batch.number, seen, share.first + batch.span.start)
            if batch.span.stop >= share.own:
                for norm_total in norms.values():
                    norm_total.start()
                grams.start()
                inputs.start()  # all of which goes on while the values' are collected
            add_values(context, values, batch, xq, wanted, seen)

    queries_keys = Layers(
        [f.query, f.key],
        lambda: query_key_objective(context, inputs, grams, norms, streams.full.shape[1]),
        [shape.query_heads, shape.key_heads],
    )
    value = Layers([f.value], partial(value_objective, context, values, gated), [shape.key_heads])
    if layerwise:
        heads = [shape.query_heads, shape.key_heads, shape.key_heads, shape.query_heads]
        names = list(f.attention_inputs)
        return solve_layers(context, Layers(names, layer_objective(inputs), heads[: len(names)]))
    if not f.attention_gate:
        return solve_layers(context, queries_keys, value)
    gate_layer = Layers([f.attention_gate], partial(gate_objective, context, gate_inputs, gated), [shape.query_heads])
    return solve_layers(context, queries_keys, value, gate_layer)


def _quantize_output(context: BlockContext, streams: Streams, attended: Tensor, given: Tensor) -> BlockResult:
    """The output projection; `attended` is its full-precision input, `given` has room for the quantized one."""
    f, t = context.family, context.transforms
    norm, writer = context.full.get_submodule(f.attention_norm), Writer(f.output, f.attention_post_norm)
    outputs = context.share.total(InputStatistics)
    for batch in context.batches(streams):
        xq = t.qkv(norm(batch.quantized))
        given[batch.span] = x = t.output(attend(context.decoder, context.quantized, xq, t.attention))
        if not context.follows_full:
            add_given(context, outputs, batch, x)
            continue
        exact = t.output.rotate(attended[batch.span].to(x.device))
        write_full(context, writer, outputs, streams, batch, exact, x)
    found = solve_layers(context, Layers([f.output], layer_objective(outputs, context.weight(f.output)), [1]))
    write_quantized(context, writer, streams, given)
    return found


def add_values(
    context: BlockContext,
    values: Total[AttentionStatistics],
    batch: Batch,
    xq: Tensor,
    attended: Tensor,
    seen: AttentionInputs,
) -> None:
    """Statistics of the values.

    Args:
        context: of the block.
        values: where they go.
        batch: which this is.
        xq: the input of the values in the quantized stream.
        attended: what attention puts out in the full-precision one.
        seen: queries and keys of the quantized one.
    """
    shape, wanted = context.shape, without_bias(context, attended.to(xq.device), seen)
    heads = shape.query_heads // shape.key_heads
    stride = value_stride(context.share.count * xq.shape[1], heads, shape.hidden, context.settings.value_rows)
    given = (xq, wanted, seen, context.weight(context.family.value))
    values.at(batch.number).add_values(*given, stride=stride, first=context.share.first + batch.span.start)
