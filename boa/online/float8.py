"""FP8 (E4M3) on one scale that calibration finds, the same for every token: of a layer's input, of keys, of values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..stored_scales import E4M3, at_least

_TOP = torch.finfo(E4M3).max
_SMALLEST, _LARGEST = 2.0**-14, 2.0**15  # of scales: float16 holds them exactly, which readers may keep them in


@dataclass(frozen=True)
class StaticFloat8:
    """Rounds numbers to `scale` times E4M3, ties to even; what is beyond 448 scales is clipped.

    Until calibration has found one, `scale` is 1, as it is in vLLM where a checkpoint has none.

    Worked example, scale 2: `[1.0, 0.1, 1000.0]` becomes `[1.0, 0.1015625, 896.0]`.
    """

    scale: Tensor | float = field(default=1.0, compare=False)

    bits: ClassVar[int] = 8
    format: ClassVar[str] = "fp8"
    found: ClassVar[str] = "scale"
    """What calibration finds of it."""

    def __call__(self, x: Tensor) -> Tensor:
        """Round `x` and read it again, in its own dtype."""
        return self.values(self.codes(x), x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """What is stored of `x`: E4M3, of the same shape."""
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide / self._scale(wide)).clamp(-_TOP, _TOP).to(E4M3)

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """What codes mean, in `dtype`."""
        wide = codes.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return wide.mul_(self._scale(wide)).to(dtype)

    def _scale(self, like: Tensor) -> Tensor | float:
        return self.scale.to(like.device, like.dtype) if isinstance(self.scale, Tensor) else self.scale


def scale_of(peak: float) -> float:
    """That of numbers whose largest absolute value is `peak`: the power of two that is peak / 448 or next above.

    Readers would take any. A number keeps its three bits of mantissa with each, and a power of two is exact in the
    dtype that a reader keeps it in. It costs less than a bit of E4M3's range, and leaves room for numbers larger than
    were seen.
    """
    return min(max(float(at_least(torch.tensor(peak / _TOP))), _SMALLEST), _LARGEST) if peak > 0 else 1.0
