"""A few directions of a layer's input are taken out before it is rounded, and kept in eight bits beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .activations import DynamicQuantizer

DIRECTED = ("qkv", "output", "gate_up")
"""The sites whose inputs have such directions. That of down, which is of products, has few that stand out."""
KEPT = 8
"""Bits of what is kept of a token along them."""
_COEFFICIENTS = DynamicQuantizer(KEPT)


@dataclass(frozen=True)
class LeadingDirections:
    """Rounds what the directions D (c, k) leave of a token by `rest`, and its coefficients along them to eight bits.

    With x' = D round8(D^T x), x becomes x' + rest(x - x'). The principal directions of a layer's input hold much of its
    energy, so that the scale of what is left is smaller (QUAD, arXiv 2503.19353; ResQ, 2412.14363, which keep them as
    channels of their own). A product with weights W is that of `rest` in few bits, and one of k columns W D.

    Until calibration has found them, the directions are 0: all is left to `rest`.
    """

    rest: DynamicQuantizer
    directions: Tensor = field(compare=False)

    format: ClassVar[str] = "int"
    found: ClassVar[str] = "directions"
    """What calibration finds of it."""

    @classmethod
    def of(cls, rest: DynamicQuantizer, width: int, count: int) -> LeadingDirections:
        """For `count` directions of inputs of so many channels, not found yet."""
        return cls(rest, torch.zeros(1, 1).expand(width, count))

    @property
    def bits(self) -> int:
        """Of what is left."""
        return self.rest.bits

    def room(self) -> Tensor:
        """A tensor for what is found."""
        return torch.zeros(self.directions.shape, dtype=torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        """Round `x` (..., c), in its own dtype."""
        coefficients, left = self.split(x)
        kept = coefficients @ self._directions(coefficients).T
        return (kept + self.rest(left)).to(x.dtype)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rounded coefficients (..., k), and what they leave (..., c), in float32 or wider."""
        wide = x if x.dtype == torch.float64 else x.float()
        directions = self._directions(wide)
        coefficients = _COEFFICIENTS(wide @ directions)
        return coefficients, wide - coefficients @ directions.T

    def through(self, weight: Tensor) -> Tensor:
        """W D (r, k), what coefficients meet in a layer of weight W (r, c)."""
        return weight @ self._directions(weight)

    def _directions(self, like: Tensor) -> Tensor:
        return self.directions.to(like.device, like.dtype)


def leading(gram: Tensor, count: int) -> Tensor:
    """The `count` principal directions of a Gram matrix E x x^T (c, c), (c, count) orthonormal but for bfloat16.

    Their signs are those with which the largest entry of each is positive.
    """
    found = torch.linalg.eigh(gram).eigenvectors[:, -count:].flip(1)
    largest = found.gather(0, found.abs().argmax(0, keepdim=True))
    return (found * largest.sign()).bfloat16()


def directed(quantizer: DynamicQuantizer | None, width: int, count: int) -> DynamicQuantizer | LeadingDirections | None:
    """The quantizer of a site, with `count` directions where it is of fewer bits than they are."""
    if quantizer is None or not count or quantizer.format != "int" or quantizer.bits >= KEPT:
        return quantizer
    return LeadingDirections.of(quantizer, width, count)
