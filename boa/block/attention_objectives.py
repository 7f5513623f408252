"""What queries, keys and values are solved by: their objectives, from statistics of both streams."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..objective.fisher import ROWS
from ..objective.gate import GateStatistics
from ..objective.objective import Objective
from ..objective.pull_back import NormStatistics, norm_pull_back, positions_pull_back, turned
from ..objective.statistics import AttentionStatistics, InputStatistics, value_stride
from ..objective.totals import Total
from ..online.attention import AttentionInputs, seen_mass
from ..solver.rounding_settings import LAYERWISE
from .context import BlockContext

NormTotals = dict[str, Total[NormStatistics]]
"""Of the norms of queries and keys, by projection."""


def norm_totals(context: BlockContext, first: int | None = None) -> NormTotals:
    """None where the family or the method has no such norms; `first` as of `Share.total`."""
    f, shape = context.family, context.shape
    if context.settings.method in LAYERWISE:
        return {}
    norms = {f.query: (f.query_norm, shape.query_heads), f.key: (f.key_norm, shape.key_heads)}
    return {
        name: context.share.total(
            partial(
                NormStatistics.of, context.weight(name), heads, context.full.get_submodule(norm), f.head_norms_whole
            ),
            first,
        )
        for name, (norm, heads) in norms.items()
        if norm is not None
    }


def weighted(context: BlockContext, norms: NormTotals, number: int, xf: Tensor, xq: Tensor) -> tuple[Tensor, Tensor]:
    """Both inputs of queries and keys, a token weighted by what the norms of all heads divide by: `pull_back`.

    The statistics of the norms see the inputs of batch `number` on the way.
    """
    if not norms:
        return xf, xq
    weights = [
        norm.at(number).add(_normed(context, context.full.get_submodule(name)(xf))) for name, norm in norms.items()
    ]
    weight = torch.cat(weights, -1).mean(-1, keepdim=True).sqrt()
    return xf * weight, xq * weight


def _normed(context: BlockContext, outputs: Tensor) -> Tensor:
    """What the norms of queries or keys read, (batch, length, heads * head_dim), of a projection's `outputs`."""
    if not context.family.head_norms_last:
        return outputs
    cos, sin = angles(context, outputs.shape[1])
    heads = outputs.unflatten(-1, (-1, context.shape.head_dim))
    return turned(heads, cos, sin, neighbours=context.family.rope_neighbours).flatten(-2)


def angles(context: BlockContext, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the block's RoPE, (length, rotated channels)."""
    cos, sin = context.decoder.position_embeddings(length, context.decoder.index_of(context.full))
    return cos[0], sin[0]


def add_heads(
    context: BlockContext, grams: Total[AttentionStatistics], number: int, seen: AttentionInputs, first: int
) -> None:
    """Statistics of what errors of queries and keys cost, from batch `number`, whose first sequence is `first`."""
    if context.settings.attention == "bound":
        grams.at(number).add_grams(seen.query, seen.key)
        return
    tokens = context.share.count * seen.query.shape[2]
    stride = value_stride(tokens, 1, context.shape.head_dim, ROWS)
    grams.at(number).add_fisher(seen, stride=stride, first=first)


def query_key_objective(
    context: BlockContext,
    inputs: Total[InputStatistics],
    grams: Total[AttentionStatistics],
    norms: NormTotals,
    length: int,
) -> Objective:
    """Query heads, then key heads: they share H_in, so they are one problem of stacked heads."""
    f, shape = context.family, context.shape
    turn = partial(positions_pull_back, neighbours=f.rope_neighbours)
    turning = angles(context, length)
    keys, queries = (gram if f.head_norms_last else turn(gram, *turning) for gram in grams.value().grams())
    h_out = {f.query: keys.repeat_interleave(shape.query_heads // len(keys), 0), f.key: queries}
    for name, norm in ((f.query, f.query_norm), (f.key, f.key_norm)):
        if norm is not None:
            moments = norms[name].value().moments
            own: Any = context.full.get_submodule(norm)
            weight = own.weight + f.norm_offset if hasattr(own, "weight") else moments.new_ones(shape.head_dim)
            h_out[name] = norm_pull_back(h_out[name], weight, moments, whole=f.head_norms_whole)
    if f.head_norms_last:
        h_out = {name: turn(gram, *turning) for name, gram in h_out.items()}
    return replace(inputs.value().objective(), h_out=torch.cat([h_out[f.query], h_out[f.key]]))


def value_objective(
    context: BlockContext, values: Total[AttentionStatistics], gated: Total[GateStatistics] | None = None
) -> Objective:
    """BoA's, with W_O^T W_O, or aespa's own, without; `gated` of attention with a gate."""
    objective = values.value().value_objective(context.weight(context.family.output))
    if not context.settings.value_output:
        return replace(objective, h_out=None)
    if gated is None or not context.family.attention_gate:
        return objective
    return replace(objective, h_out=gated.value().of_values(_read_by_output(context), context.shape.key_heads))


def gate_objective(context: BlockContext, inputs: Total[InputStatistics], gated: Total[GateStatistics]) -> Objective:
    """Of attention's gate."""
    return replace(inputs.value().objective(), h_out=gated.value().of_gate(_read_by_output(context)))


def _read_by_output(context: BlockContext) -> Tensor:
    """W_O,h^T W_O,h of each query head, (heads, head_dim, head_dim)."""
    parts = context.weight(context.family.output).unflatten(1, (context.shape.query_heads, -1)).permute(1, 2, 0).float()
    return parts @ parts.transpose(-1, -2)


def without_bias(context: BlockContext, attended: Tensor, seen: AttentionInputs) -> Tensor:
    """Attention's output (batch, length, heads * head_dim) without what the bias of the values adds to it.

    Probabilities sum to 1, so it comes out as it went in; beside sinks they do not, and it comes out as what attention
    computes with (`seen`) lets it.
    """
    bias, shape = context.full.get_submodule(context.family.value).bias, context.shape
    if not isinstance(bias, Tensor):
        return attended
    heads = bias.unflatten(0, (shape.key_heads, -1)).repeat_interleave(shape.query_heads // shape.key_heads, 0)
    added = heads if seen.sinks is None else seen_mass(seen)[..., None] * heads
    return attended - added.flatten(-2)
