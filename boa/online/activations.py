"""The dynamic quantizer of activations and of the key/value cache: one function for calibration, evaluation and use."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import stored_scales
from ..kernels.compiled import is_compiled
from ..kernels.levels import E2M1, E4M3, UNITS, nearest
from ..kernels.squares import weighted_squares

RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6)
"""The clip ratios that a vector may choose from."""
SEARCHED = 4
"""Most bits at which a vector chooses: with more levels clipping costs more than finer steps bring."""
UNCALIBRATED = 4.0
"""The global scale of NVFP4 where nothing was calibrated: groups of numbers between 0.02 and 670 have exact scales."""
OWN = "rotoboa"
CONVENTIONS = (OWN, "compressed-tensors", "vllm")
"""Whose scales inputs have: those of `DynamicQuantizer` by its clip ratio or search, or those of a reader."""
CHUNK = 1 << 24  # elements of one batch of errors


def tries(symmetric: bool) -> int:
    """The grids that a vector chooses from."""
    return len(RATIOS) + (0 if symmetric else 2)


def stock_clip(bits: int, convention: str = "compressed-tensors", *, symmetric: bool = True) -> float:
    """The clip ratio that equals a reader's own dynamic scale.

    compressed-tensors has max |x| / ((2^b - 1) / 2), 127.5 at 8 bits. vLLM's kernels have max |x| / (2^(b-1) - 1), 127,
    which is ours without clipping. With zero points both have (max - min) / (2^b - 1), zero among the levels: ours too.

    Example: 14/15 for 4 bits, 254/255 for 8; of vLLM, and with zero points, always 1.
    """
    stock = symmetric and convention == "compressed-tensors"
    return (2.0 ** (bits - 1) - 1) / ((2.0**bits - 1) / 2) if stock else 1.0


@dataclass(frozen=True)
class DynamicQuantizer:
    """Quantizes each vector along the last dimension by itself: a token's activation, or a token's key in one head.

    With `group_size`, which must divide n, each group of so many of its neighbouring numbers by itself. With `search`
    each takes, of `RATIOS`, the clip ratio that leaves it the least squared error, in place of `clip`. A ratio for all
    is too small for tokens of massive activations, whose rotated entries all lie at the peak, and too large for others.
    With a zero point it also tries two grids that have max abs x and its negative among their levels: such entries lie
    between the levels of all others, which are an even number, and all err alike, into the channel they came from.

    | symmetric | levels | scale |
    |---|---|---|
    | yes | -2^(b-1) .. 2^(b-1) - 1 | clip * max abs / (2^(b-1) - 1) |
    | no | 0 .. 2^b - 1 around a zero point | clip * (max(max, 0) - min(min, 0)) / (2^b - 1) |

    Floating point (`format`, see `stored_scales`) is symmetric, has no clip ratio, and scales that are stored;
    those of NVFP4 are divided by `global_scale`, which is found in calibration.

    Worked example, symmetric, 2 bits, clip 1: `[0.9, -0.2, 0.4, -1.0]` has scale 1, and becomes `[1, 0, 0, -1]`.
    """

    bits: int
    symmetric: bool = True
    clip: float = 1.0
    group_size: int | None = None
    search: bool = False
    format: str = "int"
    global_scale: Tensor | float = field(default=UNCALIBRATED, compare=False)

    @property
    def found(self) -> str | None:
        """What calibration finds of it: the name of the field, or None."""
        return "global_scale" if self.format == "nvfp4" else None

    @classmethod
    def of(
        cls, bits: int, symmetric: bool, clip: float, group_size: int | None = None, *, search: bool = False
    ) -> DynamicQuantizer | None:
        """The quantizer of a recipe; None at 16 bits, which leave values as they are."""
        return cls(bits, symmetric, clip, group_size, search) if bits < 16 else None

    def __call__(self, x: Tensor) -> Tensor:
        """Round `x` (..., n) to its levels and back, in its own dtype; the scale is computed in float32 or wider."""
        vectors = self.vectors(x)
        if self.format != "int":
            return self._floating(vectors).reshape(x.shape)
        scale, zero = self.grid(self.span(vectors))
        return self.values(self.levels(vectors, scale, zero), scale, zero, x.dtype).reshape(x.shape)

    def _floating(self, x: Tensor) -> Tensor:
        """Groups (..., group_size), or all of a token, rounded to E2M1 or E4M3."""
        wide = _wide(x)
        factor = self.global_scale
        factor = factor.to(wide.device, torch.float32) if isinstance(factor, Tensor) else factor
        scale = stored_scales.full_range(wide.abs().amax(-1, keepdim=True), self.format, factor)
        levels, unit = E4M3 if self.format == "fp8" else E2M1, UNITS[self.format]
        step = scale.clamp_min_(unit * torch.finfo(torch.float32).tiny) / unit
        return nearest(wide / step, levels // 2, levels).sub_(levels // 2).mul_(step).to(x.dtype)

    def vectors(self, x: Tensor) -> Tensor:
        """What has a scale each, along the last dimension: (..., n) as it is, or (..., groups, group_size), a view."""
        return x if self.group_size is None else x.unflatten(-1, (-1, self.group_size))

    def span(self, x: Tensor) -> Tensor:
        """What the grid of each vector follows from, in x's dtype: (..., 1) max abs, or (..., 2) min and max."""
        if not self.search or self.bits > SEARCHED or not x.numel():
            return self._whole(x)
        flat = x.reshape(-1, x.shape[-1])
        rows = len(flat) if is_compiled(_wide(flat[:0])) else CHUNK // (tries(self.symmetric) * x.shape[-1])
        found = torch.cat([self._searched(part) for part in flat.split(max(1, rows))])
        return found.view(*x.shape[:-1], found.shape[-1])

    def _whole(self, x: Tensor) -> Tensor:
        return x.abs().amax(-1, keepdim=True) if self.symmetric else torch.stack(torch.aminmax(x, dim=-1), -1)

    def _searched(self, x: Tensor) -> Tensor:
        """The span of each of x's vectors (n, c) that leaves the least squared error, the first of several alike."""
        whole, wide = self._whole(x), _wide(x)
        ratios = torch.tensor(RATIOS, dtype=wide.dtype, device=x.device)[:, None]
        spans = _wide(whole)[:, None] * ratios
        if not self.symmetric:
            spans = torch.cat([spans, self._evened(spans[:, 0])], 1)
        spans = spans.to(x.dtype)
        scale, zero = self.grid(spans)
        zero = torch.full_like(scale, 2.0 ** (self.bits - 1)) if zero is None else zero
        alike = wide.new_ones(1, x.shape[-1])
        errors = weighted_squares(wide[None], scale[None, ..., 0], zero[None, ..., 0], alike, 2**self.bits - 1)[0]
        best = errors.argmin(1)[:, None, None].expand(-1, 1, spans.shape[-1])
        return spans.gather(1, best)[:, 0]

    def _evened(self, span: Tensor) -> Tensor:
        """Of min and max (n, 2) the spans (n, 2, 2) of grids that have m = max abs and -m among their levels."""
        peak, top = span.abs().amax(-1, keepdim=True), 2.0 ** (self.bits - 1) - 1
        sides = torch.tensor([[-1 - 1 / top, 1], [-1, 1 + 1 / top]], dtype=span.dtype, device=span.device)
        return peak[..., None] * sides

    def grid(self, span: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point (None where symmetric) of `span`, each (..., 1), in float32 or wider."""
        wide, clip = _wide(span), 1.0 if self.search else self.clip  # which a searched span has in it
        tiny = torch.finfo(torch.float32).tiny
        if self.symmetric:
            # A division, as compressed-tensors has it: at its clip ratio the least level is a tie, broken alike.
            return (wide / ((2 ** (self.bits - 1) - 1) / clip)).clamp_min_(tiny), None
        low, high = (wide * clip).split(1, -1)
        low, high = low.clamp_max(0), high.clamp_min(0)  # zero is a level: levels less it fit int8
        scale = ((high - low) / (2**self.bits - 1)).clamp_min_(tiny)
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
