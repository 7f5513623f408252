"""What queries, keys and values are solved by: their objectives, from statistics of both streams."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..objective.fisher import ROWS
from ..objective.objective import Objective
from ..objective.pull_back import NormStatistics, norm_pull_back, positions_pull_back
from ..objective.statistics import AttentionStatistics, InputStatistics, value_stride
from ..objective.totals import Total
from ..online.attention import AttentionInputs
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
            partial(NormStatistics.of, context.weight(name), heads, context.full.get_submodule(norm)), first
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
    weights = [norm.at(number).add(context.full.get_submodule(name)(xf)) for name, norm in norms.items()]
    weight = torch.cat(weights, -1).mean(-1, keepdim=True).sqrt()
    return xf * weight, xq * weight


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
    f, shape, decoder = context.family, context.shape, context.decoder
    cos, sin = (part[0] for part in decoder.position_embeddings(length, decoder.index_of(context.full)))
    keys, queries = (positions_pull_back(gram, cos, sin) for gram in grams.value().grams())
    h_out = {f.query: keys.repeat_interleave(shape.query_heads // len(keys), 0), f.key: queries}
    for name, norm in ((f.query, f.query_norm), (f.key, f.key_norm)):
        if norm is not None:
            weight = context.full.get_parameter(f"{norm}.weight") + f.norm_offset
            h_out[name] = norm_pull_back(h_out[name], weight, norms[name].value().moments)
    return replace(inputs.value().objective(), h_out=torch.cat([h_out[f.query], h_out[f.key]]))


def value_objective(context: BlockContext, values: Total[AttentionStatistics]) -> Objective:
    """BoA's, with W_O^T W_O, or aespa's own, without."""
    objective = values.value().value_objective(context.weight(context.family.output))
    return objective if context.settings.value_output else replace(objective, h_out=None)


def without_bias(context: BlockContext, attended: Tensor) -> Tensor:
    """Attention's output (batch, length, heads * head_dim) without what the bias of the values adds to it."""
    bias, shape = context.full.get_submodule(context.family.value).bias, context.shape
    if not isinstance(bias, Tensor):
        return attended
    heads = bias.unflatten(0, (shape.key_heads, -1))
    return attended - heads.repeat_interleave(shape.query_heads // shape.key_heads, 0).flatten()
