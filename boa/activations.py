"""The dynamic quantizer of activations and of the key/value cache: one function for calibration, evaluation and use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DynamicQuantizer:
    """Quantizes each vector along the last dimension by itself: a token's activation, or a token's key in one head.

    | symmetric | levels | scale |
    |---|---|---|
    | yes | -2^(b-1) .. 2^(b-1) - 1 | clip * max abs / (2^(b-1) - 1) |
    | no | 0 .. 2^b - 1 around a zero point | clip * (max - min) / (2^b - 1) |

    Worked example, symmetric, 2 bits, clip 1: `[0.9, -0.2, 0.4, -1.0]` has scale 1, and becomes `[1, 0, 0, -1]`.
    """

    bits: int
    symmetric: bool = True
    clip: float = 1.0

    @classmethod
    def of(cls, bits: int, symmetric: bool, clip: float) -> DynamicQuantizer | None:
        """The quantizer of a recipe; None at 16 bits, which leave values as they are."""
        return cls(bits, symmetric, clip) if bits < 16 else None

    def __call__(self, x: Tensor) -> Tensor:
        """Round `x` (..., n) to its levels and back, in its own dtype; the scale is computed in float32 or wider."""
        wide = x if x.dtype == torch.float64 else x.float()
        tiny = torch.finfo(torch.float32).tiny
        if self.symmetric:
            top = 2 ** (self.bits - 1) - 1
            scale = (wide.abs().amax(-1, keepdim=True) * (self.clip / top)).clamp_min_(tiny)
            q = (wide / scale).round_().clamp_(-top - 1, top)
            return q.mul_(scale).to(x.dtype)
        top = 2**self.bits - 1
        low, high = torch.aminmax(wide, dim=-1, keepdim=True)
        low, high = low * self.clip, high * self.clip
        # A constant token has no range: as small a scale as its values can still be divided by.
        least = torch.maximum(low.abs(), high.abs()) * torch.finfo(wide.dtype).eps
        scale = torch.maximum((high - low) / top, least).clamp_min_(tiny)
        zero = (-low / scale).round_()
        q = (wide / scale).round_().add_(zero).clamp_(0, top)
        return q.sub_(zero).mul_(scale).to(x.dtype)
