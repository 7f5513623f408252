"""Scales of floating point as they are stored: NVFP4, MXFP4 and FP8, by the rules of compressed-tensors.

| format | group | a scale is stored as | and means |
|---|---|---|---|
| nvfp4 | 16 | E4M3, 2^-9 to 448 | it, divided by the tensor's own `global_scale`, float32 |
| mxfp4 | 32 | E8M0, the exponent e + 127 in a byte | 2^e |
| fp8 | an output channel | a power of two, in bfloat16 | it |
| fp8 | a token | not at all | the largest number / 448 |

Scales here are of the formats' own values: E2M1's, 0 to 6, and E4M3's, 0 to 448. Where integers are twice these, or 512
times (`kernels.levels`), so much smaller a scale is theirs. compressed-tensors has the quotient for an output channel
of FP8 too. With a power of two weights are exact in bfloat16, in which readers unpack them, and the grid is the same
one: a number keeps its three bits of mantissa.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PEAK = 6.0
"""The largest value of E2M1."""
E4M3 = torch.float8_e4m3fn
_TOP = torch.finfo(E4M3).max
_EXPONENTS = (-100, 100)  # of scales that are chosen: no weight comes near to either, and products with them are normal
_SAFE = 0.125  # stored for a group of zeros, as compressed-tensors has it
OFFSETS = {"nvfp4": range(-8, 7), "mxfp4": range(-1, 2), "fp8": range(-1, 2)}
"""What a search tries: steps in storable scales from that of the full range, from about half of it to what has the
largest weight at 4 in place of 6 (Four Over Six, arXiv 2512.02010), and a little beyond."""


def global_scale_of(peak: float) -> float:
    """That of a tensor whose largest absolute value is `peak`: a power of two, 448 * 6 / peak or just below.

    compressed-tensors takes the quotient itself. With a power of two, a weight is a product of two short numbers and
    exact in bfloat16 and float16 too, in which readers unpack it; the range it costs is half of 2^17.
    """
    return 2.0 ** math.floor(math.log2(PEAK * _TOP / peak)) if peak > 0 else 1.0


def full_range(peak: Tensor, name: str, global_scale: float | Tensor = 1.0) -> Tensor:
    """The scales of groups whose largest absolute values are `peak`, in its dtype, float32 or wider.

    MXFP4 rounds them down to a power of two, from 7/4 of one on up, and clips what is then beyond 6.
    """
    if name == "fp8":
        return peak / _TOP
    if name == "nvfp4":
        stored = (global_scale * (peak / PEAK)).clamp_max(_TOP).to(E4M3).to(peak.dtype)
        return torch.where(stored == 0, _SAFE, stored) / global_scale
    fraction, exponent = torch.frexp(peak)  # of a fraction from 1/2 on
    exponent = exponent - 1 + (fraction >= 0.875) - int(math.log2(PEAK))
    smallest = -127 if peak.dtype == torch.float32 else _EXPONENTS[0]
    return _power(torch.where(peak > 0, exponent, smallest), peak)


def at_least(scale: Tensor) -> Tensor:
    """The powers of two that are `scale` or next above, in its dtype."""
    fraction, exponent = torch.frexp(scale)
    return _power((exponent - (fraction == 0.5).to(exponent.dtype)).clamp(*_EXPONENTS), scale)


def nearest(scale: Tensor, name: str, global_scale: float = 1.0) -> Tensor:
    """The storable scales nearest to `scale`, in its dtype."""
    if name == "nvfp4":
        least = torch.finfo(E4M3).smallest_normal / 8
        return (scale * global_scale).clamp(least, _TOP).to(E4M3).to(scale.dtype) / global_scale
    fraction, exponent = torch.frexp(scale)
    return _power((exponent - 1 + (fraction > 0.75)).clamp(*_EXPONENTS), scale)


def beside(scale: Tensor, steps: Tensor | int, name: str, global_scale: float = 1.0) -> Tensor:
    """The storable scales so many steps above `scale`, which is storable; the last where there are no more."""
    if name == "nvfp4":
        codes = (scale * global_scale).to(E4M3).view(torch.uint8).to(torch.int16) + steps
        return codes.clamp(1, 126).to(torch.uint8).view(E4M3).to(scale.dtype) / global_scale
    return _power((torch.frexp(scale)[1] - 1 + steps).clamp(*_EXPONENTS), scale)


def encode(scale: Tensor, name: str, global_scale: float = 1.0) -> Tensor:
    """What is stored of storable scales: E4M3, exponents in uint8, or bfloat16."""
    if name == "fp8":
        return scale.to(torch.bfloat16)
    if name == "nvfp4":
        return (scale * global_scale).to(E4M3)
    return (torch.frexp(scale)[1] + 126).to(torch.uint8)


def decode(stored: Tensor, name: str, global_scale: float | Tensor = 1.0) -> Tensor:
    """The inverse, in float32."""
    if name == "fp8":
        return stored.float()
    if name == "nvfp4":
        return stored.float() / global_scale
    return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.to(torch.int32) - 127)


def _power(exponent: Tensor, like: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponent, dtype=like.dtype), exponent)
