"""Attention that compresses its inputs (DeepSeek's): the compressions; what reads the latents; the output projection.

With latents c_q and c_kv of a token, a head has queries [W_Q c_q], of which the last channels are turned by RoPE, keys
[W_K c_kv, k_r], k_r one for all heads and turned, and values W_V c_kv. What reads latents has the objectives of plain
attention, with latents in the place of its inputs: of W_Q what logits make of errors, of W_K the part of the keys that
is not turned, of W_V attention's mean of the latents. The compressions, behind which norms stand, have those of layers.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..objective.objective import Objective
from ..objective.pull_back import positions_pull_back
from ..objective.statistics import AttentionStatistics, InputStatistics
from ..objective.totals import Total
from ..online.attention import AttentionInputs, set_attention
from ..online.transforms import InputTransform, OnlineTransforms
from ..solver.rounding_settings import LAYERWISE
from .attention_objectives import add_heads, angles, value_objective
from .attention_step import add_values
from .block_output import transformed
from .context import BlockContext, BlockResult, Streams
from .forward_parts import capture
from .residual_stream import Writer, add_given, write_full, write_quantized
from .solving import Layers, alike, layer_objective, solve_layers


class Seen(NamedTuple):
    """Of one run: what queries, keys and values, and the output projection read, and what attention computes with."""

    queries: Tensor
    latent: Tensor
    output: Tensor
    attention: AttentionInputs


def quantize_latents(context: BlockContext, streams: Streams) -> BlockResult:
    """All layers of attention; both streams move through them."""
    found = _quantize_compressions(context, streams)
    width = context.weight(context.family.output).shape[1]
    attended = context.empty(*streams.full.shape[:2], width, dtype=streams.full.dtype)
    found |= _quantize_readers(context, streams, attended)
    return found | _quantize_output(context, streams, attended)


def _quantize_compressions(context: BlockContext, streams: Streams) -> BlockResult:
    f, t, inputs = context.family, context.transforms, context.share.total(InputStatistics)
    norm = context.full.get_submodule(f.attention_norm)
    if context.previous is None:
        for batch in context.batches(streams):
            xf = t.qkv.rotate(norm(batch.full)) if context.follows_full else None
            inputs.at(batch.number).add(xf, t.qkv(norm(batch.quantized)))
    return solve_layers(context, *alike(context, f.compressions, inputs))


def _quantize_readers(context: BlockContext, streams: Streams, attended: Tensor) -> BlockResult:
    """Queries, keys and values; `attended` becomes the full-precision input of the output projection."""
    f, shape, share, layerwise = context.family, context.shape, context.share, context.settings.method in LAYERWISE
    queries, latents = share.total(InputStatistics), share.total(InputStatistics)
    grams, values = share.total(AttentionStatistics), share.total(AttentionStatistics)
    exact = context.transforms.without_quantizers
    for batch in context.batches(streams):
        full = observe(context, context.full, exact, batch.full) if context.follows_full else None
        if full is not None:
            attended[batch.span] = full.output
        if context.previous is not None:
            continue
        seen = observe(context, context.quantized, context.transforms, batch.quantized)
        queries.at(batch.number).add(None if full is None else full.queries, seen.queries)
        latents.at(batch.number).add(None if full is None else full.latent, seen.latent)
        if layerwise or full is None:
            continue
        add_heads(context, grams, batch.number, seen.attention, share.first + batch.span.start)
        wanted = _behind(context.transforms.output, full.output)
        add_values(context, values, batch, seen.latent, wanted, seen.attention)
    if layerwise:
        both = (*alike(context, [f.query], queries), *alike(context, [f.key, f.value], latents))
        return solve_layers(context, *both)
    length, heads = streams.full.shape[1], [shape.query_heads]
    return solve_layers(
        context,
        Layers([f.query], lambda: _query_objective(context, queries, grams, length), heads),
        Layers([f.key], lambda: _key_objective(context, latents, grams), heads),
        Layers([f.value], partial(value_objective, context, values), heads),
    )


def _behind(transform: InputTransform, x: Tensor) -> Tensor:
    """What a transform was given that put out `x` without its quantizer."""
    return x if transform.rotation is None else transform.rotation.apply_transposed(x)


def _quantize_output(context: BlockContext, streams: Streams, attended: Tensor) -> BlockResult:
    """The output projection; `attended` is its full-precision input."""
    f, outputs = context.family, context.share.total(InputStatistics)
    writer, given = Writer(f.output, f.attention_post_norm), context.empty(*attended.shape, dtype=attended.dtype)
    for batch in context.batches(streams):
        x = observe(context, context.quantized, context.transforms, batch.quantized).output
        given[batch.span] = x
        if not context.follows_full:
            add_given(context, outputs, batch, x)
            continue
        write_full(context, writer, outputs, streams, batch, attended[batch.span].to(x.device), x)
    found = solve_layers(context, Layers([f.output], layer_objective(outputs, context.weight(f.output)), [1]))
    write_quantized(context, writer, streams, given)
    return found


def observe(context: BlockContext, block: nn.Module, transforms: OnlineTransforms, hidden: Tensor) -> Seen:
    """A run of the block over `hidden` (batch, length, hidden) to the output projection, with what its layers read."""
    f, found = context.family, dict[str, Tensor]()
    attention, seen = block.get_submodule(f.attention), list[AttentionInputs]()
    with transformed(context.decoder, block, transforms):
        set_attention(attention, transforms.attention, seen.append)
        looks = []
        for name in (f.query, f.value):
            look = lambda _, args, name=name: found.update({name: args[0]})  # noqa: E731
            looks.append(block.get_submodule(name).register_forward_pre_hook(look))
        try:
            output = capture(block.get_submodule(f.output), partial(context.decoder.run, block, hidden))
        finally:
            for handle in looks:
                handle.remove()
    # Latents are laid out as keys of one head.
    return Seen(found[f.query], found[f.value].reshape(*hidden.shape[:2], -1), output, seen[0])


def _query_objective(
    context: BlockContext, inputs: Total[InputStatistics], grams: Total[AttentionStatistics], length: int
) -> Objective:
    """H_out is what logits make of errors of a query, before RoPE turns its last channels."""
    keys, _ = grams.value().grams()
    cos, sin = angles(context, length)
    turned, plain = cos.shape[-1], keys.shape[-1] - cos.shape[-1]
    first = torch.arange(keys.shape[-1], device=keys.device).roll(turned)  # RoPE's channels before the others
    back = first.argsort()
    pulled = positions_pull_back(keys[:, first][..., first], cos, sin, neighbours=context.family.rope_neighbours)
    if getattr(context.decoder.config, "rope_interleave", False):  # neighbours are laid out as halves on the way
        order = torch.arange(turned, device=keys.device).view(-1, 2).T.flatten().argsort()
        order = torch.cat([order, torch.arange(turned, turned + plain, device=keys.device)])
        pulled = pulled[:, order][..., order]
    return replace(inputs.value().objective(), h_out=pulled[:, back][..., back])


def _key_objective(
    context: BlockContext, inputs: Total[InputStatistics], grams: Total[AttentionStatistics]
) -> Objective:
    """H_out is what logits make of errors of those channels of a key that are made of its latent."""
    _, queries = grams.value().grams()
    size = len(context.weight(context.family.key)) // context.shape.query_heads
    return replace(inputs.value().objective(), h_out=queries[:, :size, :size])
