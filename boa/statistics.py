"""Objectives collected while calibration text runs through a block, in two streams: full precision and quantized.

Sums are over all tokens of all sequences, in float32 per batch and float32 or wider across batches.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..rotation.hadamard import Hadamard
from .attention import Seen, causal_probabilities
from .objective import Objective

PROBABILITIES = 1 << 19  # elements of A held at a time: small enough for a processor's cache


class InputStatistics:
    """H_in = X_q X_q^T, R = (X_f - X_q) X_q^T and drift = D X_q^T of one linear input.

    The Hessian is scaled by 2 / tokens nowhere: only ratios matter to the solver, and damping is relative.
    """

    def __init__(self) -> None:
        self.h_in: Tensor | None = None
        self.residual: Tensor | None = None
        self.drift: Tensor | None = None

    def add(self, full: Tensor, quantized: Tensor, lost: Tensor | None = None, *, stream: Tensor | None = None) -> None:
        """One batch of tokens.

        Args:
            full, quantized: (..., c), the layer's input in both streams.
            lost: (..., d), D: what the residual stream has lost that the layer writes to.
            stream: (..., hidden), the residual stream that the outputs end in. A token then counts by one over its mean
                square, since every norm that reads the stream divides by that; None counts tokens alike.
        """
        if stream is not None:
            weight = stream.square().mean(-1, keepdim=True).clamp_min(torch.finfo(stream.dtype).tiny).rsqrt()
            full, quantized = full * weight, quantized * weight
            lost = None if lost is None else lost * weight
        x = quantized.reshape(-1, quantized.shape[-1])
        difference = full.reshape(x.shape) - x
        self.h_in = _plus(self.h_in, x.T @ x)
        self.residual = _plus(self.residual, difference.T @ x)
        if lost is not None:
            self.drift = _plus(self.drift, lost.reshape(len(x), -1).T @ x)

    def objective(self) -> Objective:
        """One head, H_out the identity."""
        if self.h_in is None or self.residual is None:
            raise ValueError("no calibration tokens were seen")
        return Objective(
            self.h_in[None], residual=self.residual[None], drift=None if self.drift is None else self.drift[None]
        )


class AttentionStatistics:
    """What queries, keys and values are weighed by: the Grams of keys and queries, and the A-weighted inputs of values.

    Attributes:
        keys, queries: (key heads, head_dim, head_dim): K^T K, and Q^T Q summed over each key head's query heads, after
            RoPE and with R3 taken out again.
        value_h_in, value_residual: (key heads, c, c): X A^T A X^T and (X_f A_f^T - X_q A_q^T) A_q X_q^T, summed so.
    """

    def __init__(self, rotation: Hadamard | None = None) -> None:
        self.rotation = rotation
        self.keys: Tensor | None = None
        self.queries: Tensor | None = None
        self.value_h_in: Tensor | None = None
        self.value_residual: Tensor | None = None

    def add_grams(self, query: Tensor, key: Tensor) -> None:
        """`query` (batch, heads, length, head_dim), `key` (batch, key heads, ...), as attention uses them."""
        groups = key.shape[1]
        k = key.transpose(0, 1).flatten(1, 2)
        q = query.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 3)
        self.keys = _plus(self.keys, self._unrotate(k.transpose(1, 2) @ k))
        self.queries = _plus(self.queries, self._unrotate(q.transpose(1, 2) @ q))

    def add_values(self, full: Tensor, quantized: Tensor, full_seen: Seen, quantized_seen: Seen) -> None:
        """One batch of value inputs, weighted by causal attention.

        Args:
            full, quantized: (batch, length, c), the layer's input in both streams.
            full_seen, quantized_seen: what attention computes with in both streams.

        Query positions are taken in chunks, and a chunk only meets the tokens up to its end. Whichever is cheaper is
        formed first: A X per head, or the group's sum of A^T A.
        """
        heads, length, c = full_seen.query.shape[1], full.shape[1], full.shape[2]
        groups = full_seen.key.shape[1]
        step = max(64, min(length, PROBABILITIES // (heads * length)))
        if length * c + c * c <= length * length + groups * (length * c + c * c) / heads:
            accumulate = _weighted_inputs
        else:
            accumulate = _weighted_grams
        if self.value_h_in is None or self.value_residual is None:
            self.value_h_in, self.value_residual = full.new_zeros(2, groups, c, c)
        for i in range(len(full)):
            chunks = (
                (
                    causal_probabilities(full_seen, i, start, min(start + step, length)),
                    causal_probabilities(quantized_seen, i, start, min(start + step, length)),
                )
                for start in range(0, length, step)
            )
            accumulate(full[i], quantized[i], chunks, self.value_h_in, self.value_residual)

    def _unrotate(self, gram: Tensor) -> Tensor:
        """Queries and keys were multiplied by R3: R3 G R3^T is the Gram without it."""
        if self.rotation is None:
            return gram
        half = self.rotation.apply_transposed(gram)
        return self.rotation.apply_transposed(half.transpose(-1, -2)).transpose(-1, -2)

    def grams(self) -> tuple[Tensor, Tensor]:
        """`keys` and `queries`."""
        if self.keys is None or self.queries is None:
            raise ValueError("no calibration tokens were seen")
        return self.keys, self.queries

    def value_objective(self, output: Tensor) -> Objective:
        """H_out is W_O,h^T W_O,h summed over a value head's query heads; `output` is W_O (hidden, heads * head_dim)."""
        if self.value_h_in is None or self.value_residual is None:
            raise ValueError("no calibration tokens were seen")
        groups, size = len(self.value_h_in), self.grams()[0].shape[-1]
        parts = output.T.reshape(groups, -1, size, output.shape[0]).float()
        h_out = (parts @ parts.transpose(-1, -2)).sum(1)
        return Objective(self.value_h_in, h_out, self.value_residual)


def rope_pull_back(gram: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(1/L) sum over positions l of R_l^T G R_l, BoA's H_out before RoPE.

    Args:
        gram: (heads, d, d), of vectors after RoPE.
        cos, sin: (L, d), as the model's rotary embedding gives them; R_l x = cos_l * x + sin_l * J x, where J maps
            (x1, x2) to (-x2, x1), halves of x.

    With D_c, D_s the diagonals, R_l = D_c + D_s J: the mean over l needs only the means of c c^T, c s^T and s s^T.
    """
    length, size = cos.shape
    half = size // 2
    j = torch.zeros(size, size, dtype=gram.dtype, device=gram.device)
    j[:half, half:] = -torch.eye(half, dtype=gram.dtype, device=gram.device)
    j[half:, :half] = torch.eye(half, dtype=gram.dtype, device=gram.device)
    cos, sin = cos.to(gram.dtype), sin.to(gram.dtype)
    cc, cs, ss = cos.T @ cos / length, cos.T @ sin / length, sin.T @ sin / length
    cross = (gram * cs) @ j
    return gram * cc + cross + cross.transpose(-1, -2) + j.T @ (gram * ss) @ j


def _weighted_inputs(
    full: Tensor, quantized: Tensor, chunks: Iterable[tuple[Tensor, Tensor]], h_in: Tensor, residual: Tensor
) -> None:
    """Y = A X of every head, then Y_q^T Y_q and (Y_f - Y_q)^T Y_q by group, added in place."""
    for a_full, a_quantized in chunks:
        groups, _, seen = a_full.shape
        y = (a_quantized.flatten(0, 1) @ quantized[:seen]).unflatten(0, (groups, -1))
        lost = (a_full.flatten(0, 1) @ full[:seen]).unflatten(0, (groups, -1)).sub_(y)
        h_in.baddbmm_(y.transpose(1, 2), y)
        residual.baddbmm_(lost.transpose(1, 2), y)


def _weighted_grams(
    full: Tensor, quantized: Tensor, chunks: Iterable[tuple[Tensor, Tensor]], h_in: Tensor, residual: Tensor
) -> None:
    """A_q^T A_q and A_f^T A_q by group, then X (.) X^T, added in place."""
    gram, cross = full.new_zeros(2, len(h_in), len(full), len(full))
    for a_full, a_quantized in chunks:
        seen = a_full.shape[-1]
        gram[:, :seen, :seen].baddbmm_(a_quantized.transpose(1, 2), a_quantized)
        cross[:, :seen, :seen].baddbmm_(a_full.transpose(1, 2), a_quantized)
    own = quantized.T @ (gram @ quantized)
    h_in += own
    residual += full.T @ (cross @ quantized) - own


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)
