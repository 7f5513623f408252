"""The attention of a block: queries and keys; values; the output projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from .attention import AttentionTransform, Recorder, Seen, set_attention
from .clipping import search_clip
from .objective import Objective
from .pull_back import NormStatistics, norm_pull_back, positions_pull_back
from .statistics import AttentionStatistics, InputStatistics
from .workspace import Captured, Workspace, capture


class AttentionHalf(Workspace):
    """Queries and keys, values, the output projection."""

    def _attention_half(self, full: Tensor, quantized: Tensor) -> None:
        f, shape = self.family, self.shape
        norm = self.full.get_submodule(f.attention_norm)
        sample = norm(quantized[: self.batch].to(self.decoder.device))
        self._search_input("qkv", lambda: sample, [f.query, f.key, f.value])
        self._search_cache(self.transforms.qkv(sample))
        t = self.transforms
        size = (*full.shape[:2], shape.query_heads * shape.head_dim)
        attended, given = (self.empty(*size, dtype=full.dtype) for _ in range(2))
        inputs, grams = InputStatistics(), AttentionStatistics(t.attention.rotation)
        exact, norms = AttentionTransform(), self._norm_statistics()
        for span, hf, hq in self._batches(full, quantized):
            xf, xq = t.qkv.rotate(norm(hf)), t.qkv(norm(hq))
            attended[span] = self._attend(self.full, xf, exact)
            if self.done is None:
                seen = self._meet(self.quantized, xq, t.attention)
                inputs.add(*self._weighted(norms, xf, xq))
                grams.add_grams(seen.query, seen.key)
                if not self.settings.sequential:
                    grams.add_values(xq, self._without_bias(attended[span].to(xq.device)), seen, self._weight(f.value))
        self._solve(
            [f.query, f.key],
            lambda: self._query_key_objective(inputs, grams, norms, full.shape[1]),
            [shape.query_heads, shape.key_heads],
        )

        if self.settings.sequential and self.done is None:
            # Values are weighed by the attention of quantized queries and keys.
            for span, _, hq in self._batches(full, quantized):
                xq = t.qkv(norm(hq))
                seen = self._meet(self.quantized, xq, t.attention)
                grams.add_values(xq, self._without_bias(attended[span].to(xq.device)), seen, self._weight(f.value))
        self._solve([f.value], partial(self._value_objective, grams), [shape.key_heads])

        self._search_input("output", lambda: self._attend(self.quantized, t.qkv(sample), t.attention), [f.output])
        t = self.transforms
        outputs = InputStatistics()
        for span, hf, hq in self._batches(full, quantized):
            given[span] = x = t.output(self._attend(self.quantized, t.qkv(norm(hq)), t.attention))
            exact_x = attended[span].to(x.device)
            self._write(f.output, outputs, full[span], hf, hq, exact_x, x, f.attention_post_norm)
        self._solve([f.output], partial(outputs.objective, self._weight(f.output)), [1])
        self._add(f.output, quantized, given, f.attention_post_norm)

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

    def _meet(self, block: nn.Module, x: Tensor, transform: AttentionTransform) -> Seen:
        """Queries, keys and values alone: the forward pass ends where attention would begin."""

        def stop(seen: Seen) -> None:
            raise Captured(seen)

        try:
            self._attention(block, x, transform, stop)()
        except Captured as captured:
            seen: Seen = captured.value
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

    def _norm_statistics(self) -> dict[str, NormStatistics]:
        """Of the norms of queries and keys, by projection; none where the family has none."""
        f, shape = self.family, self.shape
        norms = {f.query: (f.query_norm, shape.query_heads), f.key: (f.key_norm, shape.key_heads)}
        return {
            name: NormStatistics.of(self._weight(name), heads, self.full.get_submodule(norm))
            for name, (norm, heads) in norms.items()
            if norm is not None
        }

    def _weighted(self, norms: dict[str, NormStatistics], xf: Tensor, xq: Tensor) -> tuple[Tensor, Tensor]:
        """Both inputs of queries and keys, a token weighted by what the norms of all heads divide by: `pull_back`."""
        if not norms:
            return xf, xq
        weights = [norm.add(self.full.get_submodule(name)(xf)) for name, norm in norms.items()]
        weight = torch.cat(weights, -1).mean(-1, keepdim=True).sqrt()
        return xf * weight, xq * weight

    def _query_key_objective(
        self, inputs: InputStatistics, grams: AttentionStatistics, norms: dict[str, NormStatistics], length: int
    ) -> Objective:
        """Query heads, then key heads: they share H_in, so they are one problem of stacked heads."""
        f = self.family
        cos, sin = (part[0] for part in self.decoder.position_embeddings(length, self.decoder.index_of(self.full)))
        keys, queries = (positions_pull_back(gram, cos, sin) for gram in grams.grams())
        h_out = {f.query: keys.repeat_interleave(self.shape.query_heads // self.shape.key_heads, 0), f.key: queries}
        for name, norm in ((f.query, f.query_norm), (f.key, f.key_norm)):
            if norm is not None:
                weight = self.full.get_parameter(f"{norm}.weight") + f.norm_offset
                h_out[name] = norm_pull_back(h_out[name], weight, norms[name].moments)
        return replace(inputs.objective(), h_out=torch.cat([h_out[f.query], h_out[f.key]]))

    def _value_objective(self, grams: AttentionStatistics) -> Objective:
        """BoA's, with W_O^T W_O, or aespa's own, without."""
        objective = grams.value_objective(self._weight(self.family.output))
        return objective if self.settings.value_output else replace(objective, h_out=None)

    def _search_cache(self, x: Tensor) -> None:
        """Choose the clip ratios of keys by the error of the logits, of values by that of the output projection."""
        transform, groups = self.transforms.attention, self.shape.key_heads
        if not self.search_cache or (transform.key is None and transform.value is None):
            return
        query, key, value, *_ = self._meet(self.quantized, x, AttentionTransform(transform.rotation))
        if transform.key is not None:
            queries = query.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 3)
            keys = key.transpose(0, 1).flatten(1, 2)
            transform = replace(transform, key=search_clip(transform.key, keys, queries.transpose(1, 2) @ queries))
        if transform.value is not None:
            readers = self._weight(self.family.output).T.reshape(groups, -1, self.shape.head_dim, self.shape.hidden)
            metric = (readers @ readers.transpose(-1, -2)).sum(1)
            values = value.transpose(0, 1).flatten(1, 2)
            transform = replace(transform, value=search_clip(transform.value, values, metric))
        self.transforms = replace(self.transforms, attention=transform)
