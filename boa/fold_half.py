"""Z-Fold of a block: before anything is quantized, scales of input channels go into the layers before them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rotation.channels import SITES, absorbable, readers, scale_channels, ties
from .attention import AttentionTransform
from .attention_half import AttentionHalf
from .mlp_half import MlpHalf
from .objective import Objective
from .statistics import AttentionStatistics, InputStatistics
from .zfold import Term, channel_scales

LAYERWISE = ("gptq", "adaround")  # methods without an H_out
POOL = 8  # tokens that scales are chosen on, in multiples of the widest input


class ChannelFold(AttentionHalf, MlpHalf):
    """The scales follow from the full-precision block and stream alone, so a resumed run finds the same again."""

    def _fold(self, full: Tensor) -> None:
        """Choose the scales of the sites in `settings.zfold` and fold them into both versions of the block."""
        if not self.settings.zfold:
            return
        terms = self._terms(full)
        for site in (site for site in SITES if site in self.settings.zfold):
            tie = ties(self.shape, site)
            found = channel_scales(terms.pop(site), self.settings, tie)
            self.channel_scales[site] = found
            state = self.full.state_dict()
            zeta = absorbable(state, self.family, site, found.zeta)
            changed = scale_channels(state, self.family, self.shape, site, zeta)
            for name, tensor in changed.items():
                for block in (self.full, self.quantized):
                    block.get_parameter(name).data = tensor.clone()
            self.folded |= {name: t for name, t in changed.items() if name not in self._weights}

    @property
    def _weights(self) -> set[str]:
        return {f"{name}.weight" for name in self.family.projections}

    def _terms(self, full: Tensor) -> dict[str, list[Term]]:
        """The problem of each site, by what its inputs are in the full-precision stream."""
        f, s, t = self.family, self.shape, self.transforms
        sites = self.settings.zfold
        norms = self._norm_statistics()
        grams, inputs = AttentionStatistics(), {site: InputStatistics() for site in sites}
        widest = max(s.hidden, s.query_width, s.ffn if "down" in sites else 0)
        some = full[: -(-POOL * widest // full.shape[1])]
        for _, h, _ in self._batches(some, some):
            stream = h if self.settings.token_weights else None
            x = t.qkv.rotate(self.full.get_submodule(f.attention_norm)(h))
            attended = self._attend(self.full, x, AttentionTransform())
            if "qkv" in sites:
                seen = self._meet(self.full, x, AttentionTransform())
                inputs["qkv"].add(None, self._weighted(norms, x, x)[0])
                grams.add_grams(seen.query, seen.key)
                grams.add_values(x, self._without_bias(attended), seen, self._weight(f.value))
            written = self.full.get_submodule(f.output)(attended)
            if "output" in sites:
                inputs["output"].add(None, _by_norm(attended, written, f.attention_post_norm), stream=stream)
            if "gate_up" not in sites and "down" not in sites:
                continue
            h = h + self._normed(self.full, f.attention_post_norm, written)
            stream = h if self.settings.token_weights else None
            x = t.gate_up.rotate(self.full.get_submodule(f.mlp_norm)(h))
            if "gate_up" in sites:
                inputs["gate_up"].add(None, x, stream=stream)
            if "down" in sites:
                x = self._mlp_hidden(self.full, x)
                written = self.full.get_submodule(f.down)(x)
                inputs["down"].add(None, _by_norm(x, written, f.mlp_post_norm), stream=stream)
        terms = {}
        for site in sites:
            if site == "qkv":
                both = self._query_key_objective(inputs[site], grams, norms, full.shape[1])
                value = grams.value_objective(self._weight(f.output))
                heads = s.query_heads
                goals = {
                    f.query: (Objective(both.h_in, both.h_out[:heads]), s.query_heads),
                    f.key: (Objective(both.h_in, both.h_out[heads:]), s.key_heads),
                    f.value: (Objective(value.h_in, value.h_out), s.key_heads),
                }
            else:
                goals = {name: (inputs[site].objective(), 1) for name in readers(f, site)}
            terms[site] = [self._term(name, goal, heads) for name, (goal, heads) in goals.items()]
        return terms

    def _term(self, name: str, objective: Objective, heads: int) -> Term:
        objective.check()
        if self.settings.method in LAYERWISE:
            objective = Objective(objective.h_in)
        return Term(self._weight(name).unflatten(0, (heads, -1)), objective.damped(self.settings.damping))


def _by_norm(x: Tensor, written: Tensor, post_norm: str | None) -> Tensor:
    """The input of a projection, a token weighted by one over the norm of what it writes: as in `Workspace._write`."""
    if post_norm is None:
        return x
    return x * written.square().mean(-1, keepdim=True).clamp_min(torch.finfo(written.dtype).tiny).rsqrt()
