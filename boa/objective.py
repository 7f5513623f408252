"""Objective: the one thing every method is defined by.

    loss(Q) = sum over heads of tr(H_out E H_in E^T),  E = Q - W*

| projection | H_in | H_out |
|---|---|---|
| query head | X X^T | K^T K, pulled back through RoPE |
| key head | X X^T | Q^T Q, pulled back through RoPE, summed over its query heads |
| value head | X A^T A X^T, summed over its query heads | W_O^T W_O, summed likewise |
| output, gate, up, down | X X^T | identity |

RTN takes both as the identity, GPTQ takes H_out as the identity, BoA the table (arXiv 2406.13474, eq. 9 to 13).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_DAMPING_STEPS = 6


@dataclass(frozen=True)
class Objective:
    """A quadratic form of the error of one projection, and what shifts its target.

    Attributes:
        h_in: (B, c, c), positive semi-definite; B is 1 (all heads share it) or the number of heads.
        h_out: (heads, r, r), or None for the identity.
        residual: (B, c, c), R = (X_f - X_q) X_q^T: what the inputs lost already (GPTAQ, arXiv 2504.02692).
        drift: (heads, r, c), D X_q^T where D is what the residual stream lost that this projection writes to.
    """

    h_in: Tensor
    h_out: Tensor | None = None
    residual: Tensor | None = None
    drift: Tensor | None = None

    def damped(self, fraction: float) -> Objective:
        """With `fraction` of the mean diagonal added to both diagonals, and more where Cholesky still fails."""
        return replace(
            self,
            h_in=damp(self.h_in, fraction),
            h_out=None if self.h_out is None else damp(self.h_out, fraction),
        )

    def target(self, weight: Tensor, alpha: float = 1.0) -> Tensor:
        """W* = W + alpha (W R + drift) H_in^-1: (heads, r, c), the minimum of ||W X_f + D - Q X_q||^2 for alpha = 1.

        Call it on a damped objective: H_in must be invertible.
        """
        if alpha == 0 or (self.residual is None and self.drift is None):
            return weight
        shift = torch.zeros_like(weight)
        if self.residual is not None:
            shift = shift + weight @ self.residual.to(weight.dtype)
        if self.drift is not None:
            shift = shift + self.drift.to(weight.dtype)
        factor = torch.linalg.cholesky(self.h_in.double())
        solved = torch.cholesky_solve(shift.double().transpose(-1, -2), factor).transpose(-1, -2)
        return weight + alpha * solved.to(weight.dtype)

    def gradient(self, error: Tensor) -> Tensor:
        """H_out E H_in, half the loss's gradient: (heads, r, c)."""
        inner = error @ self.h_in.to(error.dtype)
        return inner if self.h_out is None else self.h_out.to(error.dtype) @ inner

    def loss(self, error: Tensor) -> Tensor:
        """tr(H_out E H_in E^T) per head: (heads,), for `error` (heads, r, c)."""
        return (self.gradient(error) * error).sum((-1, -2))


def damp(h: Tensor, fraction: float) -> Tensor:
    """`h` (B, n, n) in float64 with `fraction` of its mean diagonal added, ten times more at each failed Cholesky.

    A channel that is never active (zero diagonal) gets the mean diagonal, so that it is left alone by compensation.

    Raises:
        ValueError: `h` is not finite.
    """
    h = h.double()
    h = (h + h.transpose(-1, -2)) / 2
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    if not torch.isfinite(h).all():
        raise ValueError("its Hessian holds NaN or Inf")
    mean = diagonal.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    dead = diagonal <= 0
    for step in range(MAX_DAMPING_STEPS):
        added = torch.where(dead, mean, fraction * 10**step * mean)
        damped = h + torch.diag_embed(added)
        if not (torch.linalg.cholesky_ex(damped).info > 0).any():
            if step:
                logger.warning("damping raised to %g of the mean diagonal: Cholesky failed below", fraction * 10**step)
            return damped
    raise ValueError(f"its Hessian stays indefinite with {fraction * 10 ** (MAX_DAMPING_STEPS - 1):g} damping")


def inverse_factor(h: Tensor) -> Tensor:
    """The upper U with U^T U = h^-1, (B, n, n) in float64, for a positive definite `h`.

    From the Cholesky factor of the reversed matrix: with J the reversal, J h J = L L^T gives h = (J L J)(J L J)^T with
    J L J upper; U is the inverse of that, one triangular solve, without forming h^-1.
    """
    reversed_factor = torch.linalg.cholesky(h.flip(-1, -2))
    upper = reversed_factor.flip(-1, -2)
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device).expand_as(h)
    return torch.linalg.solve_triangular(upper, eye, upper=True)
