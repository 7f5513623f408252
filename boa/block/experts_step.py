"""The experts of a block: gate and up, then down, one expert after another; the router stays as it is.

An expert that all tokens go to is one of them, the last, with a weight of 1 or what a gate of its own gives it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...models.experts.expert_layers import Expert, MergedExpert, sum_of_experts
from ...models.families import Family
from ..objective.statistics import InputStatistics
from ..objective.totals import Total
from ..online.transforms import InputTransform
from .context import BlockContext, BlockResult, Streams
from .solving import Layers, layer_objective, solve_layers

logger = logging.getLogger(__name__)

GROUP = 8  # experts that ranks solve together: each has an objective in memory
POOL = 8  # tokens that an expert with too few of its own is calibrated on, in multiples of the hidden size


class Tokens(NamedTuple):
    """Tokens of an expert, in order: their numbers, routing weights p, and p over the sum of a token's, (n, 1)."""

    rows: Tensor
    p: Tensor
    share: Tensor


class Part(NamedTuple):
    """An expert's tokens of one batch of sequences, perhaps none, and both streams there, (n, hidden).

    `number` is that of the batch among those of all ranks. All but `tokens.rows` are where blocks compute.
    """

    number: int
    tokens: Tokens
    full: Tensor
    quantized: Tensor


def quantize_experts(context: BlockContext, streams: Streams) -> BlockResult:
    """Every expert by itself, on the tokens that the quantized stream routes to it; both streams move through them.

    A token counts by the square of its routing weight p, since the expert's output is multiplied by p; where its input
    is (`Family.scores_inputs`), an expert is calibrated on p x, and its tokens count alike. All of a token's
    experts together make up for what the residual stream has lost, each for its part of their weights, which need not
    sum to 1: for D to be in the sum of p y, an expert's y has D over that of p. An expert with fewer tokens than
    input channels, whose Hessian has no full rank, is calibrated on tokens of the whole layer instead, spread evenly
    over the text and alike in weight: `fallbacks` names it.
    """
    share, found = context.share, BlockResult()
    moved, index, weights = _route(context, streams)
    added = context.empty(*streams.full.shape, dtype=streams.full.dtype)
    for part in added.split(share.batch):
        part.zero_()
        context.release()
    for routed, few in _groups(context, index, weights):
        found |= _solve_group(context, streams, routed, few)
        for i, tokens in routed.items():
            _run_expert(context, i, added, streams, tokens)
    for stream, what in ((streams.full, moved), (streams.quantized, added)):
        for part, more in zip(stream.split(share.batch), what.split(share.batch), strict=True):
            part += more if context.decoder.branch_factor == 1 else more * context.decoder.branch_factor
            context.release()
    return found


def quantize_alone(context: BlockContext, inputs: Streams, index: Tensor, weights: Tensor) -> BlockResult:
    """As `quantize_experts` where no more is known of a block than what its experts read.

    Args:
        context: of the block.
        inputs: (sequences, length, hidden), what the experts read in both streams.
        index, weights: of each token of the quantized one, (tokens, experts per token).
    """
    found = BlockResult()
    for routed, few in _groups(context, index, weights):
        found |= _solve_group(context, inputs, routed, few)
    return found


def _groups(
    context: BlockContext, index: Tensor, weights: Tensor
) -> Iterator[tuple[dict[int, Tokens], dict[int, int]]]:
    """Experts that are solved together, with their tokens, and those of them that see too few."""
    share, count = context.share, len(context.family.all_experts)
    counts = torch.bincount(index.flatten(), minlength=count)
    share.ranks.sum([counts])()
    seen = counts.tolist()
    for group in torch.arange(count).split(min(share.ranks.size, GROUP)):
        routed = {i: _routed(i, index, weights) for i in group.tolist()}
        few = {i: seen[i] for i in routed if seen[i] < context.shape.hidden and i < context.shape.experts}
        yield routed, few


def _solve_group(
    context: BlockContext, streams: Streams, routed: dict[int, Tokens], few: dict[int, int]
) -> BlockResult:
    """Gate and up, then down, of some experts, by the tokens that go to each; those that see too `few` by others."""
    names = {i: context.family.expert(i) for i in routed}
    inputs, downs = ({i: context.share.total(InputStatistics) for i in routed} for _ in range(2))
    given, fallbacks = dict[int, Tokens](), dict[str, int]()
    if context.previous is None:
        given = {i: _pool(context, i, few[i], streams) if i in few else tokens for i, tokens in routed.items()}
        fallbacks = {name: number for i, number in few.items() for name in names[i] if context.settings_of(name)}
    for i, tokens in given.items():
        _add_inputs(context, inputs[i], streams, tokens)
    gates = [Layers([gate, up], layer_objective(inputs[i]), [1, 1]) for i, (gate, up, _) in names.items()]
    found = BlockResult(fallbacks=fallbacks) | solve_layers(context, *gates)
    for i, tokens in given.items():
        _add_downs(context, i, downs[i], streams, tokens)
    downs_of = [(name, downs[i]) for i, (*_, name) in names.items()]
    layers = [Layers([name], layer_objective(total, context.weight(name)), [1]) for name, total in downs_of]
    return found | solve_layers(context, *layers)


def choose(context: BlockContext, x: Tensor) -> tuple[Tensor, Tensor]:
    """Experts of each token of x (tokens, hidden), and their routing weights; both (tokens, experts per token)."""
    family, block = context.family, context.full
    more = [block.get_buffer(family.router_bias)] if family.router_bias else []
    router: Any = block.get_submodule(str(family.router))
    if family.scores_inputs:
        weights, index = router(x)[0].topk(router.top_k)
    else:
        _, weights, index = router(x, *more)
    if not family.shared:
        return index, weights
    gate = block.get_submodule(family.shared_gate)(x).sigmoid() if family.shared_gate else x.new_ones(len(x), 1)
    last = index.new_full((len(x), 1), family.expert_count)
    return torch.cat([index, last], -1), torch.cat([weights, gate.to(weights)], -1)


def expert_of(family: Family, block: nn.Module, i: int) -> Expert | MergedExpert:
    """Expert `i` of a block."""
    expert = block.get_submodule(family.shared if i == family.expert_count else f"{family.experts}.{i}")
    assert isinstance(expert, Expert | MergedExpert)
    return expert


def _down(context: BlockContext, i: int) -> InputTransform:
    """What the input of an expert's down projection goes through."""
    t = context.transforms
    return t.shared_down if i == context.family.expert_count else t.down


def _route(context: BlockContext, streams: Streams) -> tuple[Tensor, Tensor, Tensor]:
    """What the full-precision experts add to their stream, as large as that; the quantized stream's routing.

    The routing is experts and weights of each token, (tokens, experts per token).
    """
    t, family = context.transforms, context.family
    moved = context.empty(*streams.full.shape, dtype=streams.full.dtype)
    chosen: list[tuple[Tensor, Tensor]] = []

    def run(i: int, x: Tensor) -> Tensor:
        expert = expert_of(family, context.full, i)
        written: Tensor = expert.down_proj(_down(context, i).rotate(expert.inside(x)))
        return written

    for batch in context.batches(streams):
        x = _norm(context, batch.full).flatten(0, 1)
        given = (t.gate_up.rotate(x), *choose(context, x))
        written = sum_of_experts(len(family.all_experts), run, *given, scored=family.scores_inputs)
        moved[batch.span] = written.view_as(batch.full)
        index, weight = choose(context, _norm(context, batch.quantized).flatten(0, 1))
        chosen.append((index.to(streams.full.device), weight.to(streams.full.device)))
    indices, weights = zip(*chosen, strict=True)
    return moved, torch.cat(indices), torch.cat(weights)


def _routed(i: int, index: Tensor, weights: Tensor) -> Tokens:
    """The tokens of this rank that go to expert `i`."""
    rows, place = torch.where(index == i)
    p = weights[rows, place, None]
    return Tokens(rows, p, p / weights[rows].sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny))


def _pool(context: BlockContext, i: int, few: int, streams: Streams) -> Tokens:
    """Of this rank, tokens of the whole layer spread evenly, with weights that are alike, for an expert with too few.

    Each counts as if it went to one expert alone.
    """
    share, length = context.share, streams.full.shape[1]
    tokens, first = share.count * length, share.first * length
    count = min(tokens, POOL * context.shape.hidden)
    rows = torch.linspace(0, tokens - 1, count).long() - first
    rows = rows[(rows >= 0) & (rows < share.own * length)]
    alike = torch.ones(len(rows), 1, dtype=context.decoder.dtype)
    if share.ranks.rank == 0:
        logger.warning("expert %d saw %d tokens: calibrated on %d of all", i, few, count)
    return Tokens(rows, alike, alike)


def _add_inputs(context: BlockContext, total: Total[InputStatistics], streams: Streams, tokens: Tokens) -> None:
    """Statistics of gate and up."""
    t = context.transforms
    for number, part, hf, hq in _parts(context, streams, tokens):
        before, behind = _factors(context, part)
        xf, xq = t.gate_up.rotate(_norm(context, hf) * before), t.gate_up(_norm(context, hq) * before)
        total.at(number).add(xf * behind, xq * behind)
    total.start()


def _add_downs(context: BlockContext, i: int, total: Total[InputStatistics], streams: Streams, tokens: Tokens) -> None:
    """Statistics of the down projection of expert `i`, whose gate and up are quantized."""
    t, down, family, settings = context.transforms, _down(context, i), context.family, context.settings
    full, quantized = expert_of(family, context.full, i), expert_of(family, context.quantized, i)
    for number, part, hf, hq in _parts(context, streams, tokens):
        before, behind = _factors(context, part)
        exact = down.rotate(full.inside(t.gate_up.rotate(_norm(context, hf) * before)))
        given = down(quantized.inside(t.gate_up(_norm(context, hq) * before)))
        wanted = nn.functional.linear(exact, full.down_proj.weight) * behind
        if settings.drift and not family.generic:
            wanted += (hf - hq) * part.share / context.decoder.branch_factor
        total.at(number).add(None, given * behind, wanted)
    total.start()


def _run_expert(context: BlockContext, i: int, added: Tensor, streams: Streams, tokens: Tokens) -> None:
    """Add what the quantized expert `i` puts out to `added`, as large as a stream."""
    expert, flat = expert_of(context.family, context.quantized, i), added.flatten(0, 1)
    t, down = context.transforms, _down(context, i)
    for _, part, _, hq in _parts(context, streams, tokens):
        before, behind = _factors(context, part)
        y = expert.down_proj(down(expert.inside(t.gate_up(_norm(context, hq) * before)))) * behind
        flat.index_add_(0, part.rows, y.to(added))


def _factors(context: BlockContext, tokens: Tokens) -> tuple[Tensor | float, Tensor | float]:
    """What an expert's input and its output are multiplied by: one of them by p."""
    return (tokens.p, 1.0) if context.family.scores_inputs else (1.0, tokens.p)


def _norm(context: BlockContext, x: Tensor) -> Tensor:
    if context.family.generic:  # streams are of what experts read
        return x
    normed: Tensor = context.full.get_submodule(context.family.mlp_norm)(x)
    return normed


def _parts(context: BlockContext, streams: Streams, tokens: Tokens) -> Iterator[Part]:
    """An expert's tokens, a batch of sequences at a time."""
    device, share, length = context.decoder.device, context.share, streams.full.shape[1]
    full, quantized = streams.full.flatten(0, 1), streams.quantized.flatten(0, 1)
    starts = range(0, share.own, share.batch)
    inside = torch.searchsorted(
        tokens.rows, torch.tensor(starts[1:], dtype=torch.int64, device=tokens.rows.device) * length
    ).tolist()
    parts = zip(*(whole.tensor_split(inside) for whole in tokens), strict=True)
    for start, (rows, p, weight_share) in zip(starts, parts, strict=True):
        part = Tokens(rows, p.to(device), weight_share.to(device))
        yield Part(share.number(start), part, full[rows].to(device), quantized[rows].to(device))
        context.release()
