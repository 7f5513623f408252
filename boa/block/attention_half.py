"""The attention of a block: queries and keys; values; the output projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..objective.objective import Objective
from ..objective.pull_back import NormStatistics, norm_pull_back, positions_pull_back
from ..objective.statistics import AttentionStatistics, InputStatistics, KeyMean, value_stride
from ..objective.totals import Total
from ..online.attention import CENTER, AttentionInputs, AttentionTransform, Recorder, set_attention
from ..solver.rounding import LAYERWISE
from .workspace import Captured, Pending, Workspace, capture, layer_objective


@contextmanager
def _nothing_of(projection: nn.Module) -> Iterator[None]:
    """Let a linear layer put out zeros, one number seen from everywhere, and compute nothing."""
    rows = projection.get_parameter("weight").shape[0]
    projection.forward = lambda x: x.new_zeros(()).expand(*x.shape[:-1], rows)
    try:
        yield
    finally:
        del projection.forward


class AttentionHalf(Workspace):
    """Queries and keys, values, the output projection."""

    def _attention_half(self, full: Tensor, quantized: Tensor) -> None:
        f, shape = self.family, self.shape
        norm = self.full.get_submodule(f.attention_norm)
        self._center_keys(full, quantized)
        t = self.transforms
        size = (*full.shape[:2], shape.query_heads * shape.head_dim)
        attended, given = (self.empty(*size, dtype=full.dtype) for _ in range(2))
        inputs, outputs = self._total(InputStatistics), self._total(InputStatistics)
        grams, values = (self._total(partial(AttentionStatistics, t.attention.rotation)) for _ in range(2))
        exact, norms = AttentionTransform(), self._norm_statistics()
        layerwise = self.settings.method in LAYERWISE
        for span, hf, hq in self._batches(full, quantized):
            xf, xq = t.qkv.rotate(norm(hf)), t.qkv(norm(hq))
            attended[span] = wanted = self._attend(self.full, xf, exact)
            if self.previous is None:
                n = self._number(span)
                inputs.at(n).add(*self._weighted(norms, n, xf, xq))
                if layerwise:
                    continue
                seen = self._attention_inputs(self.quantized, xq, t.attention)
                grams.at(n).add_grams(seen.query, seen.key)
                if span.stop >= self.own:
                    for norm_total in norms.values():
                        norm_total.start()
                    grams.start()
                    inputs.start()  # all of which goes on while the values' are collected
                self._add_values(values, span, xq, wanted, seen)
        queries = Pending(
            [f.query, f.key],
            lambda: self._query_key_objective(inputs, grams, norms, full.shape[1]),
            [shape.query_heads, shape.key_heads],
        )
        value = Pending([f.value], partial(self._value_objective, values), [shape.key_heads])
        if layerwise:
            heads = [shape.query_heads, shape.key_heads, shape.key_heads]
            self._solve(Pending([f.query, f.key, f.value], lambda: inputs.value().objective(), heads))
        else:
            self._solve(queries, value)
        for span, hf, hq in self._batches(full, quantized):
            given[span] = x = t.output(self._attend(self.quantized, t.qkv(norm(hq)), t.attention))
            exact_x = t.output.rotate(attended[span].to(x.device))
            self._write(f.output, outputs, self._number(span), full[span], hf, hq, exact_x, x, f.attention_post_norm)
        self._solve(Pending([f.output], layer_objective(outputs, self._weight(f.output)), [1]))
        self._add(f.output, quantized, given, f.attention_post_norm)

    def _center_keys(self, full: Tensor, quantized: Tensor) -> None:
        """Find the mean of the keys that quantized queries will meet, and let keys be rounded without it.

        RoPE turns it away in pairs of channels that turn fast. What is left, in those that turn slowly and in a head's
        bias, is about half of a key's energy, and would take as much of the grid.
        """
        t, norm = self.transforms, self.full.get_submodule(self.family.attention_norm)
        if not t.attention.centered or t.attention.center is not None:
            return
        means, plain = self._total(KeyMean), AttentionTransform(t.attention.rotation)
        for span, _, hq in self._batches(full, quantized):
            means.at(self._number(span)).add(self._attention_inputs(self.quantized, t.qkv(norm(hq)), plain).key)
        # As any dtype of a checkpoint holds it, so that what is measured is what is stored.
        center = means.value().mean.flatten().bfloat16().to(quantized.dtype)
        self.transforms = replace(t, attention=replace(t.attention, center=center))
        self.centers = {f"{self.family.attention}.{CENTER}": center}

    def _add_values(
        self, values: Total[AttentionStatistics], span: slice, xq: Tensor, attended: Tensor, seen: AttentionInputs
    ) -> None:
        shape, wanted = self.shape, self._without_bias(attended.to(xq.device))
        heads = shape.query_heads // shape.key_heads
        stride = value_stride(self.count * xq.shape[1], heads, shape.hidden, self.settings.value_rows)
        given = (xq, wanted, seen, self._weight(self.family.value))
        values.at(self._number(span)).add_values(*given, stride=stride, first=self.first + span.start)

    def _attend(self, block: nn.Module, x: Tensor, transform: AttentionTransform) -> Tensor:
        """The input of the output projection (batch, length, heads * head_dim)."""
        return capture(block.get_submodule(self.family.output), self._attention(block, x, transform, None))

    def _without_bias(self, attended: Tensor) -> Tensor:
        """Attention's output (batch, length, heads * head_dim) without what the bias of the values adds to it."""
        bias = self.full.get_submodule(self.family.value).bias
        if not isinstance(bias, Tensor):
            return attended
        heads = bias.unflatten(0, (self.shape.key_heads, -1))
        return attended - heads.repeat_interleave(self.shape.query_heads // self.shape.key_heads, 0).flatten()

    def _attention_inputs(self, block: nn.Module, x: Tensor, transform: AttentionTransform) -> AttentionInputs:
        """Queries and keys: the forward pass ends where attention would begin."""

        def stop(seen: AttentionInputs) -> None:
            raise Captured(seen)

        try:
            with _nothing_of(block.get_submodule(self.family.value)):
                self._attention(block, x, replace(transform, value=None), stop)()
        except Captured as captured:
            seen: AttentionInputs = captured.value
            return seen
        raise RuntimeError("attention did not run")

    def _attention(
        self, block: nn.Module, x: Tensor, transform: AttentionTransform, recorder: Recorder | None
    ) -> Callable[[], object]:
        attention = block.get_submodule(self.family.attention)

        def run() -> object:
            set_attention(attention, transform, recorder)
            try:
                return attention(hidden_states=x, **self.decoder.arguments(block, x.shape[1]))
            finally:
                set_attention(attention, transform, None)

        return run

    def _norm_statistics(self, first: int | None = None) -> dict[str, Total[NormStatistics]]:
        """Of the norms of queries and keys, by projection; none where the family or the method has none.

        `first` as of `_total`.
        """
        f, shape = self.family, self.shape
        if self.settings.method in LAYERWISE:
            return {}
        norms = {f.query: (f.query_norm, shape.query_heads), f.key: (f.key_norm, shape.key_heads)}
        return {
            name: self._total(
                partial(NormStatistics.of, self._weight(name), heads, self.full.get_submodule(norm)), first
            )
            for name, (norm, heads) in norms.items()
            if norm is not None
        }

    def _weighted(
        self, norms: dict[str, Total[NormStatistics]], number: int, xf: Tensor, xq: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both inputs of queries and keys, a token weighted by what the norms of all heads divide by: `pull_back`."""
        if not norms:
            return xf, xq
        weights = [norm.at(number).add(self.full.get_submodule(name)(xf)) for name, norm in norms.items()]
        weight = torch.cat(weights, -1).mean(-1, keepdim=True).sqrt()
        return xf * weight, xq * weight

    def _query_key_objective(
        self,
        inputs: Total[InputStatistics],
        grams: Total[AttentionStatistics],
        norms: dict[str, Total[NormStatistics]],
        length: int,
    ) -> Objective:
        """Query heads, then key heads: they share H_in, so they are one problem of stacked heads."""
        f = self.family
        cos, sin = (part[0] for part in self.decoder.position_embeddings(length, self.decoder.index_of(self.full)))
        keys, queries = (positions_pull_back(gram, cos, sin) for gram in grams.value().grams())
        h_out = {f.query: keys.repeat_interleave(self.shape.query_heads // self.shape.key_heads, 0), f.key: queries}
        for name, norm in ((f.query, f.query_norm), (f.key, f.key_norm)):
            if norm is not None:
                weight = self.full.get_parameter(f"{norm}.weight") + f.norm_offset
                h_out[name] = norm_pull_back(h_out[name], weight, norms[name].value().moments)
        return replace(inputs.value().objective(), h_out=torch.cat([h_out[f.query], h_out[f.key]]))

    def _value_objective(self, values: Total[AttentionStatistics]) -> Objective:
        """BoA's, with W_O^T W_O, or aespa's own, without."""
        objective = values.value().value_objective(self._weight(self.family.output))
        return objective if self.settings.value_output else replace(objective, h_out=None)
