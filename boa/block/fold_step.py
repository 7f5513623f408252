"""Z-Fold of a block: before anything is quantized, scales of input channels go into the layers before them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...models.families import SITES
from ...rotation.channels import absorbable, readers, scale_channels, ties
from ..objective.objective import Objective
from ..objective.statistics import AttentionStatistics, InputStatistics
from ..objective.totals import Total
from ..online.attention import AttentionTransform
from ..solver.rounding_settings import LAYERWISE
from ..solver.zfold import Term, channel_scales
from .attention_objectives import (
    NormTotals,
    add_heads,
    norm_totals,
    query_key_objective,
    value_objective,
    weighted,
    without_bias,
)
from .context import BlockContext, BlockResult, Streams
from .forward_parts import attend, attention_inputs, branch_output, mlp_hidden
from .residual_stream import over_norm

POOL = 8  # tokens that scales are chosen on, in multiples of the widest input


def fold_channels(context: BlockContext, full: Tensor) -> BlockResult:
    """Choose the scales of the sites in `settings.zfold` and fold them into both versions of the block.

    They follow from the full-precision block and stream alone, so a resumed run finds the same again. Where channels
    share a scale, CUDA sums their parts in any order (`index_add_` is atomic there), and finds the same but for the
    last bits unless torch's deterministic algorithms are on.

    Args:
        context: whose blocks are changed.
        full: (sequences, length, hidden), the full-precision stream; it stays where it is.
    """
    result = BlockResult()
    if not context.settings.zfold:
        return result
    family, shape = context.family, context.shape
    seen = _see(context, full)
    projections = {f"{name}.weight" for name in family.projections}
    for site in (site for site in SITES if site in context.settings.zfold):
        terms = _terms(context, site, seen)
        if not terms:
            continue
        found = channel_scales(terms, ties(shape, site))
        context.share.ranks.broadcast([found.zeta])  # which all have found, and must not differ in its last bits
        result.channel_scales[site] = found
        state = context.full.state_dict()
        zeta = absorbable(state, family, site, found.zeta)
        changed = scale_channels(state, family, shape, site, zeta)
        for name, tensor in changed.items():
            for block in (context.full, context.quantized):
                block.get_parameter(name).data = tensor
        result.folded.update({name: tensor for name, tensor in changed.items() if name not in projections})
    return result


@dataclass
class _Seen:
    """What the inputs of the sites are in the full-precision stream."""

    inputs: dict[str, Total[InputStatistics]]
    grams: Total[AttentionStatistics]
    norms: NormTotals
    length: int


def _see(context: BlockContext, full: Tensor) -> _Seen:
    """One pass of the full-precision block over the first sequences."""
    f, s, t, sites = context.family, context.shape, context.transforms, context.settings.zfold
    share, decoder, block, exact = context.share, context.decoder, context.full, AttentionTransform()
    widest = max(s.hidden, s.query_width, s.ffn if "down" in sites else 0)
    first = min(-(-POOL * widest // full.shape[1]), share.count)
    seen = _Seen(
        {site: share.total(InputStatistics, first) for site in sites},
        share.total(AttentionStatistics, first),
        norm_totals(context, first),
        full.shape[1],
    )
    some = full[: max(0, first - share.first)]
    for n, span, h, _ in context.batches(Streams(some, some)):
        x = t.qkv.rotate(block.get_submodule(f.attention_norm)(h))
        attended = attend(decoder, block, x, exact)
        if "qkv" in sites:
            met = attention_inputs(decoder, block, x, exact)
            seen.inputs["qkv"].at(n).add(None, weighted(context, seen.norms, n, x, x)[0])
            add_heads(context, seen.grams, n, met, share.first + span.start)
            if context.settings.method not in LAYERWISE:
                seen.grams.at(n).add_values(x, without_bias(context, attended, met), met, context.weight(f.value))
        written = block.get_submodule(f.output)(t.output.rotate(attended))
        if "output" in sites:
            seen.inputs["output"].at(n).add(None, _by_norm(attended, written, f.attention_post_norm))
        if "gate_up" not in sites and "down" not in sites:
            continue
        if not f.parallel:
            h = h + branch_output(decoder, block, f.attention_post_norm, written)
        x = t.gate_up.rotate(block.get_submodule(f.mlp_norm)(h))
        if "gate_up" in sites:
            seen.inputs["gate_up"].at(n).add(None, x)
        if "down" in sites:
            x = mlp_hidden(f, block, x)
            written = block.get_submodule(f.down)(x)
            seen.inputs["down"].at(n).add(None, _by_norm(x, written, f.mlp_post_norm))
    return seen


def _terms(context: BlockContext, site: str, seen: _Seen) -> list[Term]:
    """The quantized projections that read `site`, with the objective that the recipe's method has for each."""
    return [term for term in _all_terms(context, site, seen) if term is not None]


def _all_terms(context: BlockContext, site: str, seen: _Seen) -> list[Term | None]:
    f, s, inputs = context.family, context.shape, seen.inputs.pop(site)
    if site != "qkv":
        goal = inputs.value().objective()
        return [_term(context, name, goal, 1) for name in readers(f, site)]
    if context.settings.method in LAYERWISE:
        goal = inputs.value().objective()
        heads = {f.query: s.query_heads, f.key: s.key_heads, f.value: s.key_heads}
        return [_term(context, name, goal, heads.get(name, 1)) for name in readers(f, site)]
    both = query_key_objective(context, inputs, seen.grams, seen.norms, seen.length)
    assert both.h_out is not None
    queries, keys = both.h_out.split([s.query_heads, s.key_heads])
    value = value_objective(context, seen.grams)
    return [
        _term(context, f.query, Objective(both.h_in, queries), len(queries)),
        _term(context, f.key, Objective(both.h_in, keys), len(keys)),
        _term(context, f.value, value, len(keys)),
        # What reads the same norm in an MLP beside attention.
        *(_term(context, name, Objective(both.h_in), 1) for name in readers(f, site)[3:]),
    ]


def _term(context: BlockContext, name: str, objective: Objective, heads: int) -> Term | None:
    settings = context.settings_of(name)
    if settings is None:
        return None
    unread = objective.unread
    try:
        objective.check()
        objective = objective.damped(context.settings.damping)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    weight = context.weight(name).unflatten(0, (heads, -1))
    if unread is not None:  # such rows ask nothing of the scales; damped, they would
        weight = weight.masked_fill(unread[..., None], 0)
    h_out = None if objective.h_out is None else objective.h_out.to(weight.dtype)
    return Term(weight, Objective(objective.h_in.to(weight.dtype), h_out), settings)


def _by_norm(x: Tensor, written: Tensor, post_norm: str | None) -> Tensor:
    """The input of a projection, a token weighted by one over the norm of what it writes: as in `write_full`."""
    return x if post_norm is None else x * over_norm(written)
