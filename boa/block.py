"""One decoder block, true-sequential: queries and keys; values; the output projection; gate and up; down.

Two streams of hidden states run through it. The full-precision one says what each layer should have computed, the
quantized one, with activation and cache quantizers on, what it is given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.decoder import Decoder
from .attention import AttentionTransform, Recorder, Seen, set_attention
from .clipping import search_clip
from .objective import Objective, is_finite
from .references import reference_losses
from .rounding import Quantized, Settings, quantize
from .statistics import AttentionStatistics, InputStatistics, rope_pull_back
from .transforms import InputTransform, OnlineTransforms

Report = Callable[[str, float], None]


class _Captured(Exception):  # noqa: N818 (a signal, not an error)
    """Carries a layer's input out of a forward pass that need not go on."""

    def __init__(self, value: Any) -> None:
        self.value = value


class BlockQuantizer:
    """Quantizes the projections of one block.

    Args:
        decoder: makes and runs blocks.
        block: the block, its norms folded and rotated as the recipe asks.
        settings: of the rounding.
        transforms: online rotations and quantizers.
        batch: sequences computed at a time.
        report: called with each projection's name and its loss relative to that of a zero weight.
        done: results of an earlier run by projection; these are used as they are.
        search_inputs: choose the clip ratio of each site's activations on the first batch.
        search_cache: likewise for keys and values.
        empty: makes the tensors that hold a layer's input for all tokens, by their size and `dtype`.
        release: called after each batch, so that what lies in files need not stay in memory.
        references: also measure RTN and plain GPTQ on each projection's objective.

    After `run`: `results` holds each projection's integers (r, c), scale and zero (r, groups), `losses` the relative
    loss of each, `objectives` what `reference_losses` finds of each where `references` are asked for, `damping` that of
    the projections whose Hessian needed more than the settings say, `quantized` the
    block with dequantized weights, `transforms` the clip ratios that were chosen.
    """

    def __init__(
        self,
        decoder: Decoder,
        block: nn.Module,
        settings: Settings,
        transforms: OnlineTransforms,
        *,
        batch: int = 8,
        report: Report | None = None,
        done: Mapping[str, Quantized] | None = None,
        search_inputs: bool = False,
        search_cache: bool = False,
        empty: Callable[..., Tensor] = torch.empty,
        release: Callable[[], None] = lambda: None,
        references: bool = False,
    ) -> None:
        self.decoder, self.family, self.shape = decoder, decoder.family, decoder.shape
        self.full = block
        self.quantized = copy.deepcopy(block)
        self.settings, self.transforms, self.batch = settings, transforms, batch
        self.report = report or (lambda name, loss: None)
        self.done, self.search_inputs, self.search_cache = done, search_inputs, search_cache
        self.empty, self.release = empty, release
        self.results: dict[str, Quantized] = {}
        self.losses: dict[str, float] = {}
        self.damping: dict[str, float] = {}
        self.references, self.objectives = references, dict[str, dict[str, float]]()

    @torch.no_grad()
    def run(self, full: Tensor, quantized: Tensor) -> None:
        """Quantize, and move both streams (sequences, length, hidden) through the block, in place.

        Raises:
            ValueError: a weight or an objective is not finite, or stays indefinite; the message names the projections.
        """
        for name in self.family.projections:
            if not torch.stack(self._weight(name).aminmax()).isfinite().all():
                raise ValueError(f"{name}: its weight holds NaN or Inf")
        self._check("", full, quantized)
        self._attention_half(full, quantized)
        self._check(self.family.output, full, quantized)
        self._mlp_half(full, quantized)
        self._check(self.family.down, full, quantized)

    def _check(self, layer: str, full: Tensor, quantized: Tensor) -> None:
        """Find NaN and Inf in the streams after the layer that has just written to them."""
        for name, stream in (("full-precision", full), ("quantized", quantized)):
            if not all(is_finite(part) for part in stream.split(self.batch)):
                where = f"{layer}: the {name} stream after it" if layer else f"the {name} stream that comes in"
                raise ValueError(f"{where} holds NaN or Inf")

    # -- attention --------------------------------------------------------------------------------------------------

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
        exact = AttentionTransform()
        for span, hf, hq in self._batches(full, quantized):
            xf, xq = norm(hf), t.qkv(norm(hq))
            attended[span] = self._attend(self.full, xf, exact)
            if self.done is None:
                seen = self._meet(self.quantized, xq, t.attention)
                inputs.add(xf, xq)
                grams.add_grams(seen.query, seen.key)
                if not self.settings.sequential:
                    grams.add_values(xq, self.full.get_submodule(f.value)(xq), attended[span].to(xq.device), seen)
        self._solve(
            [f.query, f.key],
            lambda: self._query_key_objective(inputs, grams, full.shape[1]),
            [shape.query_heads, shape.key_heads],
        )

        if self.settings.sequential and self.done is None:
            # Values are weighed by the attention of quantized queries and keys.
            for span, _, hq in self._batches(full, quantized):
                xq = t.qkv(norm(hq))
                seen = self._meet(self.quantized, xq, t.attention)
                grams.add_values(xq, self.full.get_submodule(f.value)(xq), attended[span].to(xq.device), seen)
        self._solve([f.value], lambda: grams.value_objective(self._weight(f.output)), [shape.key_heads])

        self._search_input("output", lambda: self._attend(self.quantized, t.qkv(sample), t.attention), [f.output])
        t = self.transforms
        outputs = InputStatistics()
        for span, hf, hq in self._batches(full, quantized):
            given[span] = x = t.output(self._attend(self.quantized, t.qkv(norm(hq)), t.attention))
            self._write(f.output, outputs, full[span], hf, hq, attended[span].to(x.device), x)
        self._solve([f.output], outputs.objective, [1])
        self._add(f.output, quantized, given)

    def _attend(self, block: nn.Module, x: Tensor, transform: AttentionTransform) -> Tensor:
        """The input of the output projection (batch, length, heads * head_dim)."""
        return _capture(block.get_submodule(self.family.output), self._attention(block, x, transform, None))

    def _meet(self, block: nn.Module, x: Tensor, transform: AttentionTransform) -> Seen:
        """Queries, keys and values alone: the forward pass ends where attention would begin."""

        def stop(seen: Seen) -> None:
            raise _Captured(seen)

        try:
            self._attention(block, x, transform, stop)()
        except _Captured as captured:
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
                return attention(
                    hidden_states=x,
                    attention_mask=None,
                    position_ids=torch.arange(x.shape[1], device=x.device)[None],
                    position_embeddings=self.decoder.position_embeddings(x.shape[1]),
                )
            finally:
                set_attention(attention, transform, None)

        return run

    def _query_key_objective(self, inputs: InputStatistics, grams: AttentionStatistics, length: int) -> Objective:
        """Query heads, then key heads: they share H_in, so they are one problem of stacked heads."""
        cos, sin = (part[0] for part in self.decoder.position_embeddings(length))
        keys, queries = (rope_pull_back(gram, cos, sin) for gram in grams.grams())
        queries_per_key = self.shape.query_heads // self.shape.key_heads
        return replace(inputs.objective(), h_out=torch.cat([keys.repeat_interleave(queries_per_key, 0), queries]))

    # -- mlp --------------------------------------------------------------------------------------------------------

    def _mlp_half(self, full: Tensor, quantized: Tensor) -> None:
        f = self.family
        norm = self.full.get_submodule(f.mlp_norm)
        sample = norm(quantized[: self.batch].to(self.decoder.device))
        self._search_input("gate_up", lambda: sample, [f.gate, f.up])
        t = self.transforms
        inputs, downs = InputStatistics(), InputStatistics()
        if self.done is None:
            for _, hf, hq in self._batches(full, quantized):
                inputs.add(norm(hf), t.gate_up(norm(hq)), stream=hf if self.settings.token_weights else None)
        self._solve([f.gate, f.up], inputs.objective, [1, 1])

        self._search_input("down", lambda: self._mlp_hidden(self.quantized, t.gate_up(sample)), [f.down])
        t = self.transforms
        given = self.empty(*full.shape[:2], self.shape.ffn, dtype=full.dtype)
        for span, hf, hq in self._batches(full, quantized):
            exact = t.down.rotate(self._mlp_hidden(self.full, norm(hf)))
            given[span] = x = t.down(self._mlp_hidden(self.quantized, t.gate_up(norm(hq))))
            self._write(f.down, downs, full[span], hf, hq, exact, x)
        self._solve([f.down], downs.objective, [1])
        self._add(f.down, quantized, given)

    def _mlp_hidden(self, block: nn.Module, x: Tensor) -> Tensor:
        """The input of the down projection, before R4, (batch, length, ffn)."""
        mlp = block.get_submodule(self.family.mlp)
        return _capture(block.get_submodule(self.family.down), lambda: mlp(x))

    # -- clip ratios ------------------------------------------------------------------------------------------------

    def _search_input(self, site: str, sample: Callable[[], Tensor], readers: list[str]) -> None:
        """Choose the clip ratio of one site by the output error of the layers that read it."""
        transform: InputTransform = getattr(self.transforms, site)
        if not self.search_inputs or transform.quantizer is None:
            return
        weights = torch.cat([self._weight(name) for name in readers])
        chosen = search_clip(transform.quantizer, transform.rotate(sample()).flatten(0, -2), weights.T @ weights)
        self.transforms = self.transforms.with_input(site, replace(transform, quantizer=chosen))

    def _search_cache(self, x: Tensor) -> None:
        """Choose the clip ratios of keys by the error of the logits, of values by that of the output projection."""
        transform, groups = self.transforms.attention, self.shape.key_heads
        if not self.search_cache or (transform.key is None and transform.value is None):
            return
        query, key, value, _ = self._meet(self.quantized, x, AttentionTransform(transform.rotation))
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

    # -- both -------------------------------------------------------------------------------------------------------

    def _batches(self, full: Tensor, quantized: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Both streams, `batch` sequences at a time, where blocks compute."""
        for start in range(0, len(full), self.batch):
            span = slice(start, start + self.batch)
            yield span, full[span].to(self.decoder.device), quantized[span].to(self.decoder.device)
            self.release()

    def _write(
        self,
        name: str,
        statistics: InputStatistics,
        stream: Tensor,
        hf: Tensor,
        hq: Tensor,
        exact: Tensor,
        given: Tensor,
    ) -> None:
        """Move a batch of the full stream through a projection that writes to it, and collect the other's statistics.

        Args:
            stream: the batch of the full stream, changed in place.
            hf, hq: both streams before the projection, where blocks compute.
            exact, given: the projection's input in both.
        """
        projection = self.full.get_submodule(name)
        written = projection(exact)
        if self.done is None:
            lost = written - projection(given)
            if self.settings.drift:
                lost += hf - hq
            statistics.add(None, given, lost, stream=hf if self.settings.token_weights else None)
        stream += written.to(stream.device)

    def _add(self, name: str, stream: Tensor, inputs: Tensor) -> None:
        """Move the quantized stream through a projection that is quantized now."""
        projection = self.quantized.get_submodule(name)
        for part, x in zip(stream.split(self.batch), inputs.split(self.batch), strict=True):
            part += projection(x.to(self.decoder.device)).to(part.device)
            self.release()

    def _weight(self, name: str) -> Tensor:
        return self.full.get_parameter(f"{name}.weight").data

    def _solve(self, names: list[str], objective: Callable[[], Objective], heads: list[int]) -> None:
        """Projections that share an H_in, their heads stacked into one problem."""
        if self.done is None:
            stacked = torch.cat(
                [self._weight(name).unflatten(0, (h, -1)) for name, h in zip(names, heads, strict=True)]
            )
            try:
                goal = objective()
                goal.check()
                result = quantize(stacked, goal, self.settings)
            except ValueError as error:
                raise ValueError(f"{', '.join(names)}: {error}") from error
            # An error of the size of the weight itself is 1.
            loss = goal.loss(result.dequantize() - stacked).clamp_min(0) / goal.loss(stacked).clamp_min(1e-30)
            parts = [
                [piece.flatten(0, 1) for piece in tensor.split(heads)]
                for tensor in (result.integers, result.scale, result.zero)
            ]
            for i, (name, part) in enumerate(zip(names, loss.split(heads), strict=True)):
                self.results[name] = Quantized(*(pieces[i] for pieces in parts))
                self.losses[name] = float(part.mean())
                if result.damping > self.settings.damping:
                    self.damping[name] = result.damping
                self.report(name, self.losses[name])
            if self.references:
                found = reference_losses(stacked, goal, self.settings, result, heads)
                self.objectives.update(zip(names, found, strict=True))
        else:
            self.results.update({name: self.done[name] for name in names})
        for name in names:
            weight = self.quantized.get_parameter(f"{name}.weight")
            weight.data = self.results[name].dequantize().to(weight.device, weight.dtype)


def _capture(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """The input of `module` in `run`, which goes no further."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Captured(args[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        run()
    except _Captured as captured:
        return captured.value
    finally:
        handle.remove()
    raise RuntimeError("the captured layer did not run")
