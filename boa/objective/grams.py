"""Grams X^T X, which are symmetric: only half of each is summed, and the other filled in at the end."""

from __future__ import annotations

from torch import Tensor

MIRROR = 1024  # columns of a symmetric matrix that are copied at a time


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add x^T x to `total` (B, c, c), the blocks on and below its diagonal only; `x` is (B, n, c)."""
    for below in gram_parts(total):
        rows, width = below.shape[1:]
        start = x.shape[-1] - rows
        below.baddbmm_(x[..., start:].transpose(1, 2), x[..., start : start + width])


def gram_parts(total: Tensor | None) -> list[Tensor]:
    """The parts of symmetric matrices (..., c, c) that `add_gram` fills, as views: columns, from the diagonal down."""
    if total is None:
        return []
    columns = total.shape[-1]
    width = max(64, -(-columns // 4))
    return [total[..., start:, start : start + width] for start in range(0, columns, width)]


def mirrored(total: Tensor) -> Tensor:
    """Fill in, in place, the other half of the symmetric matrices (B, c, c) of which `add_gram` made the lower one."""
    columns = total.shape[-1]
    for start in range(0, columns, MIRROR):
        stop = min(start + MIRROR, columns)
        part = total[:, start:stop, start:stop]
        part.copy_(part.tril() + part.tril(-1).transpose(1, 2))
        total[:, start:stop, stop:] = total[:, stop:, start:stop].transpose(1, 2)
    return total
