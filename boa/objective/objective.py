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
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..stopwatch import stage

logger = logging.getLogger(__name__)

MAX_DAMPING = 1000.0
FEW_TOKENS = 4
"""With fewer tokens than so many times its channels a Hessian is shrunk: from there on it gains little (measured on the
embedded model: inputs of down, rounded by 16 to 5504 tokens, and their loss on 2048 others)."""
DEPENDENT = 3.0
"""The damping that loses least on other text is two to five times that of independent tokens there."""
MOST_SHRUNK = 30.0  # times the mean diagonal, which then decides alone
TRIANGLE = 512  # columns of a triangular matrix that are inverted at a time


@dataclass(frozen=True)
class Objective:
    """A quadratic form of the error of one projection, and what shifts its target.

    Attributes:
        h_in: (B, c, c), positive semi-definite; B is 1 (all heads share it) or the number of heads.
        h_out: (heads, r, r), or None for the identity.
        residual: (B, c, c), R = (X_f - X_q) X_q^T: what the inputs lost already (GPTAQ, arXiv 2504.02692).
        drift: (heads, r, c), D X_q^T where D is what the residual stream lost that this projection writes to.
        damping: the largest part of its mean diagonal that Cholesky needed on the diagonal of `h_in` or `h_out`.
        tokens: that `h_in` and what shifts the target are sums over, for `shrinkage`; None: as many as are needed.
        memo: where it is not None, what follows from `h_in` alone is kept in it, for objectives of the same `h_in`.
    """

    h_in: Tensor
    h_out: Tensor | None = None
    residual: Tensor | None = None
    drift: Tensor | None = None
    damping: float = 0.0
    tokens: int | None = None
    memo: dict[Any, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def dead(self) -> Tensor:
        """The channels that are never active in the quantized stream, (B, c); to be asked of what is not damped."""
        return self.h_in.diagonal(dim1=-2, dim2=-1) <= 0

    @property
    def unread(self) -> Tensor | None:
        """The rows whose output nothing reads, (heads, r); None where H_out is the identity. Of what is not damped."""
        return None if self.h_out is None else self.h_out.diagonal(dim1=-2, dim2=-1) <= 0

    def check(self) -> None:
        """Find NaN and Inf where they come in.

        Raises:
            ValueError: names what holds them: a stream's input of the layer, or what its outputs are weighed by.
        """
        parts = {
            "its input in the quantized stream": self.h_in,
            "what weighs its outputs": self.h_out,
            "its input in the full-precision stream": self.residual,
            "what it should put out": self.drift,
        }
        for name, part in parts.items():
            if part is not None and not is_finite(part):
                raise ValueError(f"{name} holds NaN or Inf, or its squares overflow")

    @stage("factors")
    def damped(self, fraction: float) -> Objective:
        """With `fraction` of the mean diagonal added to both diagonals, and more where Cholesky still fails.

        More is added to `h_in` where it is of few tokens: see `shrinkage`. `damping` of the result is the largest
        fraction of all that Cholesky needed.
        """
        h_in, used, memo = self.once(
            ("damped", fraction),
            lambda: (
                *_damp(self.h_in, fraction, shrinkage(self.h_in, self.tokens)),
                None if self.memo is None else {},
            ),
        )
        h_out, used_out = (None, 0.0) if self.h_out is None else _damp(self.h_out, fraction)
        return replace(self, h_in=h_in, h_out=h_out, damping=max(used, used_out), memo=memo)

    def once(self, key: Any, work_out: Callable[[], Any]) -> Any:
        """What `work_out` gives, which follows from `h_in`; from the memo where there is one."""
        if self.memo is None:
            return work_out()
        if key not in self.memo:
            self.memo[key] = work_out()
        return self.memo[key]

    @stage("factors")
    def target(self, weight: Tensor, alpha: float = 1.0) -> Tensor:
        """W* = W + alpha (W R + drift) H_in^-1: (heads, r, c), the minimum of ||W X_f + D - Q X_q||^2 for alpha = 1.

        Call it on a damped objective: H_in must be invertible.
        """
        if alpha == 0 or (self.residual is None and self.drift is None):
            return weight
        shift = torch.zeros_like(weight)
        if self.residual is not None:
            shift += weight @ self.residual.to(weight.dtype)
        if self.drift is not None:
            shift += self.drift.to(weight.dtype)
        factor = self.once("cholesky", lambda: torch.linalg.cholesky(self.h_in.double()))
        # The factor may be the largest tensor there is. cholesky_solve would copy it, for every head that shares it.
        columns = shift.double().reshape(len(factor), -1, shift.shape[-1]).transpose(-1, -2)
        half = torch.linalg.solve_triangular(factor, columns, upper=False)
        torch.linalg.solve_triangular(factor.transpose(-1, -2), half, upper=True, out=half)
        return weight + alpha * half.transpose(-1, -2).reshape(shift.shape).to(weight.dtype)

    def of_heads(self, index: Tensor) -> Objective:
        """That of some heads, by their numbers (n,), on the device of the matrices."""
        each = len(self.h_in) > 1
        return replace(
            self,
            h_in=self.h_in[index] if each else self.h_in,
            h_out=None if self.h_out is None else self.h_out[index],
            residual=self.residual[index] if each and self.residual is not None else self.residual,
            drift=None if self.drift is None else self.drift[index],
            memo=None if each else self.memo,
        )

    def gradient(self, error: Tensor) -> Tensor:
        """H_out E H_in, half the loss's gradient: (heads, r, c)."""
        inner = error @ self.h_in.to(error.dtype)
        return inner if self.h_out is None else self.h_out.to(error.dtype) @ inner

    def loss(self, error: Tensor) -> Tensor:
        """tr(H_out E H_in E^T) per head: (heads,), for `error` (heads, r, c)."""
        return (self.gradient(error) * error).sum((-1, -2))


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor Inf: both pass through the sum, which is quicker than looking at each."""
    return bool(tensor.sum(dtype=torch.float64).isfinite())


def shrinkage(h: Tensor, tokens: int | None) -> Tensor | None:
    """The part of the mean diagonal to be added to each matrix of `h` (B, c, c), a sum over few tokens, (B, 1).

    With fewer tokens than channels, or not many more, H shows directions that other text has not: what is rounded by it
    loses more on other text than rounding to nearest. Shrunk towards its mean diagonal it is closer to the H of much
    text: Oracle Approximating Shrinkage (Chen, Wiesel, Eldar and Hero 2010, eq. 23) finds by how much from c, the
    tokens, tr(H^2) and tr(H)^2, so that a low rank is left what it shows. Tokens of one text are not independent, as it
    takes them to be, hence `DEPENDENT`. None where there are tokens enough.
    """
    c = h.shape[-1]
    if tokens is None or c == 1 or tokens >= FEW_TOKENS * c:
        return None
    h = h.double()
    squares, trace = h.square().sum((-2, -1)), h.diagonal(dim1=-2, dim2=-1).sum(-1).square()
    tiny = torch.finfo(h.dtype).tiny
    spread = ((tokens + 1 - 2 / c) * (squares - trace / c)).clamp_min(tiny)
    rho = (((1 - 2 / c) * squares + trace) / spread).clamp_max(1)
    return (DEPENDENT * rho / (1 - rho).clamp_min(tiny)).clamp_max(MOST_SHRUNK)[:, None]


def _damp(h: Tensor, fraction: float, more: Tensor | None = None) -> tuple[Tensor, float]:
    """`h` (B, n, n) in float64 with `fraction` of its mean diagonal added, ten times more at each failed Cholesky.

    Each matrix has its own fraction, at least that of `more` (B, 1), whatever it is beside; the largest that a failed
    Cholesky needed, or `fraction`, is returned too. A channel that is never active
    (zero diagonal) gets the mean diagonal, so that it is left alone by compensation. A matrix of nothing but zeros
    becomes the identity.

    Raises:
        ValueError: `h` is not finite.
    """
    h = h.to(torch.float64, copy=True)
    symmetrize(h)
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    if not is_finite(h):
        raise ValueError("its Hessian holds NaN or Inf")
    original = diagonal.clone()
    mean = original.mean(-1, keepdim=True)
    # The identity where there is nothing at all: steps are divided by both diagonals, whose product must not vanish.
    mean.masked_fill_(mean < torch.finfo(torch.float32).tiny, 1)
    dead = original <= 0
    wanted = torch.full_like(mean, fraction)
    wanted = wanted if more is None else torch.maximum(wanted, more)
    used = wanted.clone()
    while True:
        diagonal.copy_(original + torch.where(dead, mean, used * mean))  # in place: Hessians are the largest tensors
        failed = torch.linalg.cholesky_ex(h).info > 0
        most = float(torch.where(used > wanted, used, torch.full_like(used, fraction)).max())
        if not failed.any():
            if most > fraction:
                logger.warning("Cholesky failed: damping raised from %g to %g of the mean diagonal", fraction, most)
            return h, most
        if most >= MAX_DAMPING:
            raise ValueError(f"its Hessian stays indefinite with {most:g} damping")
        used[failed] *= 10


def symmetrize(h: Tensor) -> None:
    """Replace h (B, n, n) by (h + h^T) / 2, block row by block row."""
    n = h.shape[-1]
    for start in range(0, n, TRIANGLE):
        block = slice(start, min(start + TRIANGLE, n))
        mean = (h[:, block, start:] + h[:, start:, block].transpose(-1, -2)).div_(2)
        h[:, block, start:] = mean
        h[:, start:, block] = mean.transpose(-1, -2)


@stage("factors")
def inverse_factor(h: Tensor) -> Tensor:
    """The upper U with U^T U = h^-1, (B, n, n) in float64, for a positive definite `h`.

    From the Cholesky factor of the reversed matrix: with J the reversal, J h J = L L^T gives h = (J L J)(J L J)^T with
    J L J upper; U is the inverse of that, without forming h^-1. Of a large h, two copies are held at a time.
    """
    factor = h.flip(-1, -2).transpose(-1, -2)  # columns in their order, as LAPACK has it: it works in place
    del h  # the caller may have passed it on
    torch.linalg.cholesky(factor, out=factor)
    upper = torch.empty_like(factor, memory_format=torch.contiguous_format)
    n = len(factor[0])
    for start in range(0, n, TRIANGLE):
        stop = min(start + TRIANGLE, n)
        upper[:, start:stop] = factor[:, n - stop : n - start].flip(-1, -2)
    del factor
    invert_upper(upper)
    return upper


def invert_upper(u: Tensor) -> None:
    """Replace upper triangular matrices (B, n, n) by their inverses, block column by block column.

    [[A, C], [0, D]]^-1 = [[A^-1, -A^-1 C D^-1], [0, D^-1]]: A is inverted already, D is a small block.
    """
    n = u.shape[-1]
    eye = torch.eye(min(TRIANGLE, n), dtype=u.dtype, device=u.device)
    for start in range(0, n, TRIANGLE):
        block = slice(start, min(start + TRIANGLE, n))
        size = block.stop - start
        inverse = torch.linalg.solve_triangular(
            u[:, block, block], eye[:size, :size].expand(len(u), -1, -1), upper=True
        )
        u[:, block, block] = inverse
        if start:
            u[:, :start, block] = u[:, :start, :start] @ (u[:, :start, block] @ inverse).neg_()
