"""The experts of a block: gate and up, then down, one expert after another; the router stays as it is."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ..models.layout import Expert, Experts
from .clipping import search_clip
from .statistics import InputStatistics
from .workspace import Workspace

logger = logging.getLogger(__name__)

POOL = 8  # tokens that an expert with too few of its own is calibrated on, in multiples of the hidden size


class ExpertsHalf(Workspace):
    """Every expert by itself, on the tokens that the quantized stream routes to it.

    A token counts by the square of its routing weight p, since the expert's output is multiplied by p; all of a token's
    experts together make up for what the residual stream has lost, each by its p. An expert with fewer tokens than
    input channels, whose Hessian has no full rank, is calibrated on tokens of the whole layer instead, spread evenly
    over the text and alike in weight: `fallbacks` names it.
    """

    def _experts_half(self, full: Tensor, quantized: Tensor) -> None:
        experts = self._experts(self.full)
        self._search_experts(quantized[: self.batch])
        t = self.transforms
        moved, index, weights = self._route(full, quantized)
        flat_full, flat_quantized = full.flatten(0, 1), quantized.flatten(0, 1)
        added = self.empty(*full.shape, dtype=full.dtype)
        for part in added.split(self.batch):
            part.zero_()
            self.release()
        flat_added = added.flatten(0, 1)
        for i in range(len(experts)):
            token, place = torch.where(index == i)
            p = weights[token, place, None]
            gate, up, down = self.family.expert(i)
            rows, p_rows = token, p
            if len(token) < self.shape.hidden:
                rows, p_rows = self._pool(len(flat_full))
                if self.done is None:
                    self.fallbacks.update(dict.fromkeys((gate, up, down), len(token)))
                    logger.warning("expert %d saw %d tokens: calibrated on %d of all", i, len(token), len(rows))
            inputs, downs = InputStatistics(), InputStatistics()
            if self.done is None:
                for hf, hq, scale in self._rows(flat_full, flat_quantized, rows, p_rows):
                    xf, xq = t.gate_up.rotate(self._norm(hf)), t.gate_up(self._norm(hq))
                    inputs.add(xf * scale, xq * scale, stream=hf if self.settings.token_weights else None)
            self._solve([gate, up], inputs.objective, [1, 1])
            if self.done is None:
                for hf, hq, scale in self._rows(flat_full, flat_quantized, rows, p_rows):
                    self._add_down(i, downs, hf, hq, scale)
            self._solve([down], partial(downs.objective, self._weight(down)), [1])
            expert, start = self._expert(self.quantized, i), 0
            for _, hq, scale in self._rows(flat_full, flat_quantized, token, p):
                y = expert.down_proj(t.down(expert.inside(t.gate_up(self._norm(hq))))) * scale
                flat_added.index_add_(0, token[start : start + len(y)], y.to(flat_added))
                start += len(y)
        for stream, what in ((full, moved), (quantized, added)):
            for part, more in zip(stream.split(self.batch), what.split(self.batch), strict=True):
                part += more
                self.release()

    def _add_down(self, i: int, downs: InputStatistics, hf: Tensor, hq: Tensor, scale: Tensor) -> None:
        """Statistics of the down projection of expert `i`, whose gate and up are quantized; all (tokens, ...)."""
        t, full, quantized = self.transforms, self._expert(self.full, i), self._expert(self.quantized, i)
        exact = t.down.rotate(full.inside(t.gate_up.rotate(self._norm(hf))))
        given = t.down(quantized.inside(t.gate_up(self._norm(hq))))
        wanted = full.down_proj(exact)
        if self.settings.drift:
            wanted += hf - hq
        downs.add(None, given * scale, wanted * scale, stream=hf if self.settings.token_weights else None)

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
        self, full: Tensor, quantized: Tensor, rows: Tensor, p: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Both streams and the routing weights of some tokens, a part at a time, where blocks compute."""
        device, size = self.decoder.device, self.batch * 512
        for part, weight in zip(rows.split(size), p.split(size), strict=True):
            yield full[part].to(device), quantized[part].to(device), weight.to(device)
            self.release()

    def _pool(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Tokens of the whole layer, and weights that are alike."""
        count = min(tokens, POOL * self.shape.hidden)
        rows = torch.linspace(0, tokens - 1, count).long()
        return rows, torch.ones(count, 1, dtype=self.decoder.dtype)

    def _search_experts(self, quantized: Tensor) -> None:
        """Clip ratios of the experts' inputs, one for all of them at each of both sites."""
        f, x = self.family, self._norm(quantized.to(self.decoder.device)).flatten(0, 1)
        self._search_input("gate_up", lambda: x, list(f.mlp_inputs))
        site = self.transforms.down
        if not self.search_inputs or site.quantizer is None:
            return
        seen: list[Tensor] = []

        def run(expert: Expert, x: Tensor) -> Tensor:
            seen.append(site.rotate(expert.inside(x)))
            return expert.down_proj(seen[-1])

        self._experts(self.full)(self.transforms.gate_up(x), *self._choose(x), run)
        metric = torch.stack([self._weight(name).T @ self._weight(name) for name in f.downs]).mean(0)
        chosen = search_clip(site.quantizer, torch.cat(seen), metric)
        self.transforms = self.transforms.with_input("down", type(site)(site.rotation, chosen))

    def _experts(self, block: nn.Module) -> Experts:
        experts = block.get_submodule(str(self.family.experts))
        assert isinstance(experts, Experts)
        return experts

    def _expert(self, block: nn.Module, i: int) -> Expert:
        expert = self._experts(block)[i]
        assert isinstance(expert, Expert)
        return expert
