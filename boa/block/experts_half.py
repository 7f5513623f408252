"""The experts of a block: gate and up, then down, one expert after another; the router stays as it is."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...models.layout import Expert, Experts
from ..objective.statistics import InputStatistics
from ..objective.totals import Total
from .workspace import Pending, Workspace, layer_objective

logger = logging.getLogger(__name__)

GROUP = 8  # experts that ranks solve together: each has an objective in memory
POOL = 8  # tokens that an expert with too few of its own is calibrated on, in multiples of the hidden size


class Tokens(NamedTuple):
    """Tokens of an expert, in order: their numbers, routing weights p, and p over the sum of a token's, (n, 1)."""

    rows: Tensor
    p: Tensor
    share: Tensor


class ExpertsHalf(Workspace):
    """Every expert by itself, on the tokens that the quantized stream routes to it.

    A token counts by the square of its routing weight p, since the expert's output is multiplied by p. All of a token's
    experts together make up for what the residual stream has lost, each for its part of their weights, which need not
    sum to 1: for D to be in the sum of p y, an expert's y has D over that of p. An expert with fewer tokens than
    input channels, whose Hessian has no full rank, is calibrated on tokens of the whole layer instead, spread evenly
    over the text and alike in weight: `fallbacks` names it.
    """

    def _experts_half(self, full: Tensor, quantized: Tensor) -> None:
        experts = self._experts(self.full)
        moved, index, weights = self._route(full, quantized)
        added = self.empty(*full.shape, dtype=full.dtype)
        for part in added.split(self.batch):
            part.zero_()
            self.release()
        flat_full, flat_quantized, flat_added = (stream.flatten(0, 1) for stream in (full, quantized, added))
        counts = torch.bincount(index.flatten(), minlength=len(experts))
        self._sum_now(counts)
        for group in torch.arange(len(experts)).split(min(self.ranks.size, GROUP)):
            routed = {i: self._routed(i, index, weights) for i in group.tolist()}
            names = {i: self.family.expert(i) for i in routed}
            inputs, downs = ({i: self._total(InputStatistics) for i in routed} for _ in range(2))
            seen = {}
            if self.previous is None:
                seen = {i: self._calibrated_on(i, int(counts[i]), routed[i], full.shape[1]) for i in routed}
            for i, tokens in seen.items():
                self._add_inputs(inputs[i], flat_full, flat_quantized, tokens, full.shape[1])
            self._solve(*(Pending([*names[i][:2]], layer_objective(inputs[i]), [1, 1]) for i in routed))
            for i, tokens in seen.items():
                self._add_downs(i, downs[i], flat_full, flat_quantized, tokens, full.shape[1])
            downs_of = [(name, downs[i]) for i, (*_, name) in names.items()]
            self._solve(*(Pending([n], layer_objective(total, self._weight(n)), [1]) for n, total in downs_of))
            for i, tokens in routed.items():
                self._run_expert(i, flat_added, flat_full, flat_quantized, tokens, full.shape[1])
        for stream, what in ((full, moved), (quantized, added)):
            for part, more in zip(stream.split(self.batch), what.split(self.batch), strict=True):
                part += more
                self.release()

    def _routed(self, i: int, index: Tensor, weights: Tensor) -> Tokens:
        """The tokens of this rank that go to expert `i`."""
        rows, place = torch.where(index == i)
        p = weights[rows, place, None]
        return Tokens(rows, p, p / weights[rows].sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny))

    def _calibrated_on(self, i: int, count: int, routed: Tokens, length: int) -> Tokens:
        """What expert `i`, which `count` tokens of all ranks go to, is calibrated on: of this rank's tokens which."""
        if count >= self.shape.hidden:
            return routed
        tokens, total = self._pool(length)
        self.fallbacks.update(dict.fromkeys(self.family.expert(i), count))
        if self.ranks.rank == 0:
            logger.warning("expert %d saw %d tokens: calibrated on %d of all", i, count, total)
        return tokens

    def _add_inputs(
        self, total: Total[InputStatistics], full: Tensor, quantized: Tensor, tokens: Tokens, length: int
    ) -> None:
        """Statistics of gate and up; both streams are (tokens, hidden)."""
        t = self.transforms
        for number, part, hf, hq in self._rows(full, quantized, tokens, length):
            xf, xq = t.gate_up.rotate(self._norm(hf)), t.gate_up(self._norm(hq))
            total.at(number).add(xf * part.p, xq * part.p)
        total.start()

    def _add_downs(
        self, i: int, total: Total[InputStatistics], full: Tensor, quantized: Tensor, tokens: Tokens, length: int
    ) -> None:
        """Statistics of the down projection of expert `i`."""
        for number, part, hf, hq in self._rows(full, quantized, tokens, length):
            self._add_down(i, total.at(number), hf, hq, part)
        total.start()

    def _run_expert(self, i: int, added: Tensor, full: Tensor, quantized: Tensor, tokens: Tokens, length: int) -> None:
        """Add what the quantized expert `i` puts out."""
        t, expert = self.transforms, self._expert(self.quantized, i)
        for _, part, _, hq in self._rows(full, quantized, tokens, length):
            y = expert.down_proj(t.down(expert.inside(t.gate_up(self._norm(hq))))) * part.p
            added.index_add_(0, part.rows, y.to(added))

    def _add_down(self, i: int, downs: InputStatistics, hf: Tensor, hq: Tensor, part: Tokens) -> None:
        """Statistics of the down projection of expert `i`, whose gate and up are quantized; all (tokens, ...)."""
        t, full, quantized = self.transforms, self._expert(self.full, i), self._expert(self.quantized, i)
        exact = t.down.rotate(full.inside(t.gate_up.rotate(self._norm(hf))))
        given = t.down(quantized.inside(t.gate_up(self._norm(hq))))
        wanted = full.down_proj(exact) * part.p
        if self.settings.drift:
            wanted += (hf - hq) * part.share
        downs.add(None, given * part.p, wanted)

    def _route(self, full: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the full-precision experts add to their stream, as large as that; the quantized stream's routing.

        The routing is experts and weights of each token, (tokens, experts per token).
        """
        t, experts = self.transforms, self._experts(self.full)
        moved = self.empty(*full.shape, dtype=full.dtype)
        chosen: list[tuple[Tensor, Tensor]] = []

        def run(expert: Expert, x: Tensor) -> Tensor:
            return expert.down_proj(t.down.rotate(expert.inside(x)))

        for span, hf, hq in self._batches(full, quantized):
            x = self._norm(hf).flatten(0, 1)
            moved[span] = experts(t.gate_up.rotate(x), *self._choose(x), run).view_as(hf)
            index, weight = self._choose(self._norm(hq).flatten(0, 1))
            chosen.append((index.to(full.device), weight.to(full.device)))
        indices, weights = zip(*chosen, strict=True)
        return moved, torch.cat(indices), torch.cat(weights)

    def _choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and weights of each token, (tokens, experts per token)."""
        _, weights, index = self.full.get_submodule(str(self.family.router))(x)
        return index, weights

    def _norm(self, x: Tensor) -> Tensor:
        normed: Tensor = self.full.get_submodule(self.family.mlp_norm)(x)
        return normed

    def _rows(
        self, full: Tensor, quantized: Tensor, tokens: Tokens, length: int
    ) -> Iterator[tuple[int, Tokens, Tensor, Tensor]]:
        """Those of a batch of sequences at a time, perhaps none: its number, which tokens, with weights where blocks
        compute, and both streams there.
        """
        device, starts = self.decoder.device, range(0, self.own, self.batch)
        inside = torch.searchsorted(
            tokens.rows, torch.tensor(starts[1:], dtype=torch.int64, device=tokens.rows.device) * length
        ).tolist()
        parts = zip(*(whole.tensor_split(inside) for whole in tokens), strict=True)
        for start, (rows, p, share) in zip(starts, parts, strict=True):
            part = Tokens(rows, p.to(device), share.to(device))
            yield self._number(slice(start, None)), part, full[rows].to(device), quantized[rows].to(device)
            self.release()

    def _pool(self, length: int) -> tuple[Tokens, int]:
        """Tokens of the whole layer spread evenly: which of this rank's, with weights that are alike; how many in all.

        Each counts as if it went to one expert alone.
        """
        tokens, first = self.count * length, self.first * length
        count = min(tokens, POOL * self.shape.hidden)
        rows = torch.linspace(0, tokens - 1, count).long() - first
        rows = rows[(rows >= 0) & (rows < self.own * length)]
        alike = torch.ones(len(rows), 1, dtype=self.decoder.dtype)
        return Tokens(rows, alike, alike), count

    def _experts(self, block: nn.Module) -> Experts:
        experts = block.get_submodule(str(self.family.experts))
        assert isinstance(experts, Experts)
        return experts

    def _expert(self, block: nn.Module, i: int) -> Expert:
        expert = self._experts(block)[i]
        assert isinstance(expert, Expert)
        return expert
