"""Objectives collected while calibration text runs through a block, in two streams: full precision and quantized.

Sums are over all tokens of all sequences, in float32 per batch; across batches `totals` has them in float64, and in
float32 where a run is deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...rotation.hadamard import Hadamard
from ..online.attention import AttentionInputs, causal_probabilities
from ..stopwatch import stage
from .fisher import fisher_grams
from .grams import add_gram, gram_parts, mirrored
from .objective import Objective

PROBABILITIES = 1 << 20  # elements of A held at a time: small enough for a processor's cache
MIXED = 1 << 21  # elements of A X held, at least a chunk's: products of many rows are few
ON_A_GPU = 64  # times as many: there it is the number of operations that counts


def mixing_dtype(x: Tensor) -> torch.dtype:
    """In which A X is formed: bfloat16 where a processor multiplies it faster, else x's own.

    Of float32 alone, on processors with AVX-512 BF16 or AMX: twice as fast there. Each entry of A X is then off by up
    to 2^-9 of itself, either way. What is made of it is float32: a Gram whose entries were rounded is not positive
    semi-definite any more, by more than damping makes up for where a few channels are much larger than the others.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and _has_bfloat16():
        return torch.bfloat16
    return x.dtype


@cache
def _has_bfloat16() -> bool:
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # which torch 2.9 has not
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


class InputStatistics:
    """H_in = X_q X_q^T of one linear input, and what its target is made from: R = (X_f - X_q) X_q^T, or Y X_q^T.

    The Hessian is scaled by 2 / tokens nowhere: only ratios matter to the solver, and damping is relative.
    """

    def __init__(self) -> None:
        self.h_in: Tensor | None = None
        self.residual: Tensor | None = None
        self.wanted: Tensor | None = None
        self.tokens: Tensor | None = None  # how many, (1,)

    @stage("input statistics")
    def add(self, full: Tensor | None, quantized: Tensor, wanted: Tensor | None = None) -> None:
        """One batch of tokens.

        Args:
            full: (..., c), the layer's input in the full-precision stream; None where `wanted` is given.
            quantized: (..., c), its input in the quantized one.
            wanted: (..., r), Y: what the layer should put out, without its bias. A layer with fewer outputs than inputs
                is cheaper to describe by these.
        """
        x = quantized.reshape(-1, quantized.shape[-1])
        difference = None if full is None else full.reshape(x.shape) - x
        wanted = None if wanted is None else wanted.reshape(len(x), -1)
        self.h_in = torch.zeros(2 * x.shape[1:], dtype=x.dtype, device=x.device) if self.h_in is None else self.h_in
        add_gram(self.h_in[None], x[None])
        if difference is not None:
            self.residual = _plus(self.residual, difference.T @ x)
        if wanted is not None:
            self.wanted = _plus(self.wanted, wanted.T @ x)
        self.tokens = _plus(self.tokens, x.new_full((1,), len(x)))

    def sums(self) -> dict[str, list[Tensor]]:
        """As `totals.Statistics` has it; of H_in what `add_gram` fills."""
        return _named(h_in=gram_parts(self.h_in), residual=self.residual, wanted=self.wanted, tokens=self.tokens)

    def objective(self, weight: Tensor | None = None) -> Objective:
        """One head, H_out the identity; `weight` (r, c) is the full-precision one, needed where outputs were wanted."""
        if self.h_in is None:
            raise ValueError("no calibration tokens were seen")
        h_in = mirrored(self.h_in[None])
        residual = None if self.residual is None else self.residual[None]
        drift = _drift(self.wanted, weight, h_in)
        return Objective(h_in, residual=residual, drift=drift, tokens=_number(self.tokens))


def value_stride(tokens: int, heads: int, width: int, rows: int) -> int:
    """Every so many queries are `rows` rows of A X for each of `width` input channels of the values; all where 0.

    Args:
        tokens: of the whole calibration set.
        heads: query heads of a value head, which are summed.
    """
    return max(1, tokens * heads // (rows * width)) if rows else 1


class AttentionStatistics:
    """What queries, keys and values are weighed by: the Grams of keys and queries, and the A-weighted inputs of values.

    Attributes:
        keys, queries: (key heads, head_dim, head_dim): K^T K, and Q^T Q summed over each key head's query heads, after
            RoPE and with R3 taken out again; or what `fisher` has in their place, `keys` by query head.
        value_h_in: (key heads, c, c): X_q A_q^T A_q X_q^T, summed so; before `mirrored`, blocks above the diagonal
            say nothing.
        value_drift: (key heads, head_dim, c): (W X_f A_f^T - W X_q A_q^T) A_q X_q^T, summed so.
        tokens: how many the values of both are of, (1,).
    """

    def __init__(self, rotation: Hadamard | None = None) -> None:
        self.rotation = rotation
        self.keys: Tensor | None = None
        self.queries: Tensor | None = None
        self.value_h_in: Tensor | None = None
        self.value_drift: Tensor | None = None
        self.tokens: Tensor | None = None

    @stage("head statistics")
    def add_grams(self, query: Tensor, key: Tensor) -> None:
        """`query` (batch, heads, length, head_dim), `key` (batch, key heads, ...), as attention uses them."""
        groups = key.shape[1]
        k = key.transpose(0, 1).flatten(1, 2)
        q = query.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 3)
        self.keys = _plus(self.keys, self._unrotate(k.transpose(1, 2) @ k))
        self.queries = _plus(self.queries, self._unrotate(q.transpose(1, 2) @ q))

    @stage("head statistics")
    def add_fisher(self, seen: AttentionInputs, *, stride: int = 1, first: int = 0) -> None:
        """One batch, by what attention makes of errors in place of `add_grams`; `keys` is by query head then."""
        scale = ON_A_GPU if seen.query.is_cuda else 1
        keys, queries = fisher_grams(seen, PROBABILITIES * scale, stride, first)
        self.keys = _plus(self.keys, self._unrotate(keys))
        self.queries = _plus(self.queries, self._unrotate(queries))

    @stage("value statistics")
    def add_values(
        self,
        inputs: Tensor,
        attended: Tensor,
        seen: AttentionInputs,
        weight: Tensor,
        *,
        stride: int = 1,
        first: int = 0,
    ) -> None:
        """One batch of value inputs, weighted by causal attention.

        Args:
            inputs: (batch, length, c), X_q: the layer's input in the quantized stream.
            attended: (batch, length, heads * head_dim), W X_f A_f^T: attention's output in the full-precision stream,
                without the bias of the values (probabilities sum to 1, so it comes out of attention as it went in).
            seen: what attention computes with in the quantized stream.
            weight: W (key heads * head_dim, c), in full precision.
            stride: only every so many queries count: neighbours attend to nearly the same.
            first: the number of the batch's first sequence; sequence i starts with query i modulo `stride`.

        Query positions are taken in chunks, and a chunk only meets the tokens up to its end. Whichever is cheaper is
        formed first: A X per head, or the group's sum of A^T A.
        """
        length, c = inputs.shape[1:]
        heads, groups = seen.query.shape[1], seen.key.shape[1]
        scale, per = ON_A_GPU if inputs.is_cuda else 1, heads // groups
        # Chunks see as many keys as without a stride: what lies in the future of a chunk's first query is for nothing.
        step = max(64, min(length, PROBABILITIES * scale // (heads * length)))
        step = -(-step // stride) * stride
        wide = length * c + c * c > length * length + groups * stride * (length * c + c * c) / heads
        weight = weight.unflatten(0, (groups, -1))
        if self.value_h_in is None or self.value_drift is None:
            self.value_h_in = inputs.new_zeros(groups, c, c)
            self.value_drift = inputs.new_zeros(weight.shape)
        self.tokens = _plus(self.tokens, inputs.new_full((1,), len(inputs) * length))
        attended = attended.unflatten(-1, (groups, per, -1)).permute(0, 2, 3, 1, 4)
        quick = inputs.dtype if wide else mixing_dtype(inputs)
        room = 0 if wide else max(per * (step // stride), MIXED * scale // (groups * c))
        mixed, outputs, filled = inputs.new_empty(groups, room, c), inputs.new_empty(groups, room, weight.shape[1]), 0
        for i, x in enumerate(inputs.to(quick)):
            offset = (first + i) % stride
            chunks = [range(start, min(start + step, length), stride) for start in range(offset, length, step)]
            queries = [slice(chunk[0], chunk[-1] + 1, stride) for chunk in chunks]
            if wide:
                self._add_wide(x, weight, seen, i, [(part, attended[i, :, :, part]) for part in queries])
                continue
            for part in queries:
                a = causal_probabilities(seen, i, part.start, part.stop, stride).to(quick)
                rows = a.shape[1]
                if filled + rows > room:
                    self._add_mixed(mixed[:, :filled], outputs[:, :filled], weight)
                    filled = 0
                into = slice(filled, filled + rows)
                mixed[:, into] = (a.flatten(0, 1) @ x[: part.stop]).unflatten(0, (groups, -1))
                outputs[:, into] = attended[i, :, :, part].flatten(1, 2)
                filled += rows
        if filled:
            self._add_mixed(mixed[:, :filled], outputs[:, :filled], weight)

    def _add_mixed(self, mixed: Tensor, outputs: Tensor, weight: Tensor) -> None:
        """Rows of A X (key heads, n, c) and of what is wanted of them, (key heads, n, head_dim), which is used up."""
        assert self.value_h_in is not None and self.value_drift is not None
        outputs.baddbmm_(mixed, weight.transpose(1, 2), alpha=-1)
        self.value_drift.baddbmm_(outputs.transpose(1, 2), mixed)
        add_gram(self.value_h_in, mixed)

    def _add_wide(
        self, x: Tensor, weight: Tensor, seen: AttentionInputs, index: int, chunks: list[tuple[slice, Tensor]]
    ) -> None:
        """One sequence (length, c), by way of the group's sum of A^T A; of chunks the queries and what they want."""
        assert self.value_h_in is not None and self.value_drift is not None
        groups, length = len(weight), len(x)
        values = x @ weight.transpose(1, 2)
        gram, pulled = x.new_zeros(groups, length, length), x.new_zeros(groups, weight.shape[1], length)
        for queries, outputs in chunks:
            stop = queries.stop
            a = causal_probabilities(seen, index, queries.start, stop, queries.step)
            pulled[..., :stop].baddbmm_((outputs.flatten(1, 2) - a @ values[:, :stop]).transpose(1, 2), a)
            add_gram(gram[:, :stop, :stop], a)
        self.value_drift += pulled @ x
        self.value_h_in += x.T @ (mirrored(gram) @ x)

    def _unrotate(self, gram: Tensor) -> Tensor:
        """Queries and keys were multiplied by R3: R3 G R3^T is the Gram without it."""
        if self.rotation is None:
            return gram
        half = self.rotation.apply_transposed(gram)
        return self.rotation.apply_transposed(half.transpose(-1, -2)).transpose(-1, -2)

    def sums(self) -> dict[str, list[Tensor]]:
        """As `totals.Statistics` has it; of H_in what `add_gram` fills."""
        return _named(
            keys=self.keys,
            queries=self.queries,
            value_h_in=gram_parts(self.value_h_in),
            value_drift=self.value_drift,
            tokens=self.tokens,
        )

    def grams(self) -> tuple[Tensor, Tensor]:
        """`keys` and `queries`."""
        if self.keys is None or self.queries is None:
            raise ValueError("no calibration tokens were seen")
        return self.keys, self.queries

    def value_objective(self, output: Tensor) -> Objective:
        """H_out is W_O,h^T W_O,h summed over a value head's query heads; `output` is W_O (hidden, heads * head_dim)."""
        if self.value_h_in is None or self.value_drift is None:
            raise ValueError("no calibration tokens were seen")
        groups, size = self.value_drift.shape[:2]
        parts = output.T.reshape(groups, -1, size, output.shape[0]).float()
        h_out = (parts @ parts.transpose(-1, -2)).sum(1)
        return Objective(mirrored(self.value_h_in), h_out, drift=self.value_drift, tokens=_number(self.tokens))


@stage("factors")
def _drift(wanted: Tensor | None, weight: Tensor | None, h_in: Tensor) -> Tensor | None:
    """D X^T for D = Y - W X, what the outputs W X lack of those that are wanted: Y X^T - W H_in, (B, r, c).

    So the outputs W X need never be formed.
    """
    if wanted is None:
        return None
    if weight is None:
        raise ValueError("outputs are wanted of a layer whose weight is not given")
    return wanted.view(len(h_in), -1, h_in.shape[-1]) - weight.to(h_in.dtype) @ h_in


def _named(**tensors: Tensor | list[Tensor] | None) -> dict[str, list[Tensor]]:
    """Parts by name, of those that are there."""
    lists = {name: [found] if isinstance(found, Tensor) else found for name, found in tensors.items()}
    return {name: parts for name, parts in lists.items() if parts}


def _number(tokens: Tensor | None) -> int | None:
    return None if tokens is None else round(float(tokens))


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)
