"""The dynamic quantizer of activations and of the key/value cache: one function for calibration, evaluation and use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DynamicQuantizer:
    """Quantizes each vector along the last dimension by itself: a token's activation, or a token's key in one head.

    With `group_size`, which must divide n, each group of so many of its neighbouring numbers by itself.

    | symmetric | levels | scale |
    |---|---|---|
    | yes | -2^(b-1) .. 2^(b-1) - 1 | clip * max abs / (2^(b-1) - 1) |
    | no | 0 .. 2^b - 1 around a zero point | clip * (max - min) / (2^b - 1) |

    Worked example, symmetric, 2 bits, clip 1: `[0.9, -0.2, 0.4, -1.0]` has scale 1, and becomes `[1, 0, 0, -1]`.
    """

    bits: int
    symmetric: bool = True
    clip: float = 1.0
    group_size: int | None = None

    @classmethod
    def of(cls, bits: int, symmetric: bool, clip: float, group_size: int | None = None) -> DynamicQuantizer | None:
        """The quantizer of a recipe; None at 16 bits, which leave values as they are."""
        return cls(bits, symmetric, clip, group_size) if bits < 16 else None

    def __call__(self, x: Tensor) -> Tensor:
        """Round `x` (..., n) to its levels and back, in its own dtype; the scale is computed in float32 or wider."""
        wide = self.vectors(_wide(x))
        scale, zero = self.grid(self.span(wide))
        return self.values(self.levels(wide, scale, zero), scale, zero, x.dtype).reshape(x.shape)

    def vectors(self, x: Tensor) -> Tensor:
        """What has a scale each, along the last dimension: (..., n) as it is, or (..., groups, group_size), a view."""
        return x if self.group_size is None else x.unflatten(-1, (-1, self.group_size))

    def span(self, x: Tensor) -> Tensor:
        """What the grid of each vector follows from, in x's dtype: (..., 1) max abs, or (..., 2) min and max."""
        return x.abs().amax(-1, keepdim=True) if self.symmetric else torch.stack(torch.aminmax(x, dim=-1), -1)

    def grid(self, span: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point (None where symmetric) of `span`, each (..., 1), in float32 or wider."""
        wide = _wide(span)
        tiny = torch.finfo(torch.float32).tiny
        if self.symmetric:
            # A division, as compressed-tensors has it: at its clip ratio the least level is a tie, broken alike.
            return (wide / ((2 ** (self.bits - 1) - 1) / self.clip)).clamp_min_(tiny), None
        low, high = (wide * self.clip).split(1, -1)
        # A constant token has no range: as small a scale as its values can still be divided by.
        least = torch.maximum(low.abs(), high.abs()) * torch.finfo(wide.dtype).eps
        scale = torch.maximum((high - low) / (2**self.bits - 1), least).clamp_min_(tiny)
        return scale, (-low / scale).round_()

    def levels(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The integer levels of `x` on this grid, (..., n) in the grid's dtype."""
        levels = (_wide(x) / scale).round_()
        if zero is None:
            top = 2 ** (self.bits - 1) - 1
            return levels.clamp_(-top - 1, top)
        return levels.add_(zero).clamp_(0, 2**self.bits - 1)

    def values(self, levels: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What the levels mean, in `dtype`; `levels`, in the grid's dtype, may be overwritten."""
        return (levels if zero is None else levels.sub_(zero)).mul_(scale).to(dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
