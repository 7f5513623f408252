"""Objectives collected while calibration text runs through a block, in two streams: full precision and quantized.

Sums are over all tokens of all sequences, in float32 per batch and float32 or wider across batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rotation.hadamard import Hadamard
from .objective import Objective


class InputStatistics:
    """H_in = X_q X_q^T, R = (X_f - X_q) X_q^T and drift = D X_q^T of one linear input.

    The Hessian is scaled by 2 / tokens nowhere: only ratios matter to the solver, and damping is relative.
    """

    def __init__(self) -> None:
        self.h_in: Tensor | None = None
        self.residual: Tensor | None = None
        self.drift: Tensor | None = None

    def add(self, full: Tensor, quantized: Tensor, lost: Tensor | None = None) -> None:
        """`full`, `quantized` (..., c): the layer's input in both streams; `lost` (..., d): what the stream lost."""
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

    def add_values(self, full: Tensor, quantized: Tensor, a_full: Tensor, a_quantized: Tensor, groups: int) -> None:
        """One batch of value inputs.

        Args:
            full, quantized: (batch, length, c), the layer's input in both streams.
            a_full, a_quantized: (batch, heads, length, length) causal probabilities of both.
            groups: number of key heads.

        Whichever is cheaper is formed first: A X per head, or the group's sum of A^T A.
        """
        heads, length = a_full.shape[1], a_full.shape[2]
        c = full.shape[-1]
        direct = heads * (length * c + c * c)
        grams = heads * length * length + groups * (length * c + c * c)
        for i in range(full.shape[0]):
            if direct <= grams:
                y = (a_quantized[i] @ quantized[i]).view(groups, -1, c)
                lost = (a_full[i] @ full[i]).view(groups, -1, c).sub_(y)
                h_in, residual = y.transpose(1, 2) @ y, lost.transpose(1, 2) @ y
            else:
                aq = a_quantized[i].view(groups, -1, length)
                af = a_full[i].view(groups, -1, length)
                gram, cross = aq.transpose(1, 2) @ aq, af.transpose(1, 2) @ aq
                h_in = quantized[i].T @ (gram @ quantized[i])
                residual = full[i].T @ (cross @ quantized[i]) - h_in
            self.value_h_in = _plus(self.value_h_in, h_in)
            self.value_residual = _plus(self.value_residual, residual)

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


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)
