"""Z-Fold of a block: before anything is quantized, scales of input channels go into the layers before them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.families import SITES
from ...rotation.channels import absorbable, readers, scale_channels, ties
from ..objective.objective import Objective
from ..objective.pull_back import NormStatistics
from ..objective.statistics import AttentionStatistics, InputStatistics
from ..objective.totals import Total
from ..online.attention import AttentionTransform
from ..solver.rounding import LAYERWISE
from ..solver.zfold import Term, channel_scales
from .attention_half import AttentionHalf
from .mlp_half import MlpHalf

POOL = 8  # tokens that scales are chosen on, in multiples of the widest input


@dataclass
class _Seen:
    """What the inputs of the sites are in the full-precision stream."""

    inputs: dict[str, Total[InputStatistics]]
    grams: Total[AttentionStatistics]
    norms: dict[str, Total[NormStatistics]]
    length: int


class ChannelFold(AttentionHalf, MlpHalf):
    """The scales follow from the full-precision block and stream alone, so a resumed run finds the same again.

    Where channels share a scale, CUDA sums their parts in any order (`index_add_` is atomic there), and finds the same
    but for the last bits unless torch's deterministic algorithms are on.
    """

    def _fold(self, full: Tensor) -> None:
        """Choose the scales of the sites in `settings.zfold` and fold them into both versions of the block."""
        if not self.settings.zfold:
            return
        seen = self._see(full)
        projections = {f"{name}.weight" for name in self.family.projections}
        for site in (site for site in SITES if site in self.settings.zfold):
            found = channel_scales(self._terms(site, seen), self.settings, ties(self.shape, site))
            self.ranks.broadcast([found.zeta])  # which all have found, and which must not differ in its last bits
            self.channel_scales[site] = found
            state = self.full.state_dict()
            zeta = absorbable(state, self.family, site, found.zeta)
            changed = scale_channels(state, self.family, self.shape, site, zeta)
            for name, tensor in changed.items():
                for block in (self.full, self.quantized):
                    block.get_parameter(name).data = tensor
            self.folded |= {name: tensor for name, tensor in changed.items() if name not in projections}

    def _see(self, full: Tensor) -> _Seen:
        """One pass of the full-precision block over the first sequences; the stream stays where it is."""
        f, s, t, sites = self.family, self.shape, self.transforms, self.settings.zfold
        widest = max(s.hidden, s.query_width, s.ffn if "down" in sites else 0)
        first = min(-(-POOL * widest // full.shape[1]), self.count)
        seen = _Seen(
            {site: self._total(InputStatistics, first) for site in sites},
            self._total(AttentionStatistics, first),
            self._norm_statistics(first),
            full.shape[1],
        )
        some = full[: max(0, first - self.first)]
        for span, h, _ in self._batches(some, some):
            n = self._number(span)
            x = t.qkv.rotate(self.full.get_submodule(f.attention_norm)(h))
            attended = self._attend(self.full, x, AttentionTransform())
            if "qkv" in sites:
                met = self._attention_inputs(self.full, x, AttentionTransform())
                seen.inputs["qkv"].at(n).add(None, self._weighted(seen.norms, n, x, x)[0])
                seen.grams.at(n).add_grams(met.query, met.key)
                if self.settings.method not in LAYERWISE:
                    seen.grams.at(n).add_values(x, self._without_bias(attended), met, self._weight(f.value))
            written = self.full.get_submodule(f.output)(t.output.rotate(attended))
            if "output" in sites:
                seen.inputs["output"].at(n).add(None, _by_norm(attended, written, f.attention_post_norm))
            if "gate_up" not in sites and "down" not in sites:
                continue
            h = h + self._normed(self.full, f.attention_post_norm, written)
            x = t.gate_up.rotate(self.full.get_submodule(f.mlp_norm)(h))
            if "gate_up" in sites:
                seen.inputs["gate_up"].at(n).add(None, x)
            if "down" in sites:
                x = self._mlp_hidden(self.full, x)
                written = self.full.get_submodule(f.down)(x)
                seen.inputs["down"].at(n).add(None, _by_norm(x, written, f.mlp_post_norm))
        return seen

    def _terms(self, site: str, seen: _Seen) -> list[Term]:
        """The projections that read `site`, with the objective that the recipe's method has for each."""
        f, inputs = self.family, seen.inputs.pop(site)
        if site != "qkv":
            goal = inputs.value().objective()
            return [self._term(name, goal, 1) for name in readers(f, site)]
        if self.settings.method in LAYERWISE:
            goal, s = inputs.value().objective(), self.shape
            heads = {f.query: s.query_heads, f.key: s.key_heads, f.value: s.key_heads}
            return [self._term(name, goal, count) for name, count in heads.items()]
        both = self._query_key_objective(inputs, seen.grams, seen.norms, seen.length)
        assert both.h_out is not None
        queries, keys = both.h_out.split([self.shape.query_heads, self.shape.key_heads])
        value = self._value_objective(seen.grams)
        return [
            self._term(f.query, Objective(both.h_in, queries), len(queries)),
            self._term(f.key, Objective(both.h_in, keys), len(keys)),
            self._term(f.value, value, len(keys)),
        ]

    def _term(self, name: str, objective: Objective, heads: int) -> Term:
        unread = objective.unread
        try:
            objective.check()
            objective = objective.damped(self.settings.damping)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        weight = self._weight(name).unflatten(0, (heads, -1))
        if unread is not None:  # such rows ask nothing of the scales; damped, they would
            weight = weight.masked_fill(unread[..., None], 0)
        h_out = None if objective.h_out is None else objective.h_out.to(weight.dtype)
        return Term(weight, Objective(objective.h_in.to(weight.dtype), h_out))


def _by_norm(x: Tensor, written: Tensor, post_norm: str | None) -> Tensor:
    """The input of a projection, a token weighted by one over the norm of what it writes: as in `Workspace._write`."""
    if post_norm is None:
        return x
    return x * written.square().mean(-1, keepdim=True).clamp_min(torch.finfo(written.dtype).tiny).rsqrt()
