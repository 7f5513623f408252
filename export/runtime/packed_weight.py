"""What every layer with a packed weight holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from ...boa import super_scales
from ...boa.kernels.levels import E2M1_ZERO, middle_of
from ...boa.online.transforms import INPUT_FOUND
from ...boa.scheme import SUPER, TWO_LEVELS
from ...boa.stored_scales import E4M3, decode
from ..packing import SUPER_PARTS, packed_width

_KEPT = ("scale", "global_scale", *SUPER_PARTS, *INPUT_FOUND)


class PackedWeight(nn.Module):
    """Buffers, as in the files: `qweight` (rows, words) int32, `scale` (rows, groups) float16, `zero` (rows, groups)
    uint8; a value is `scale * (integer - zero)`. What others read of `weight`, its device and whether it learns, is
    that of the packed words.

    Of two levels, `scale` and `zero` are bytes, and `super_scale` and `super_zero` float16: see `super_scales`.
    Floating point has `scale` as `stored_scales` has it and no `zero`; NVFP4 has a `global_scale` (1,) float32, and FP8
    its numbers themselves in the words.
    """

    qweight: Tensor
    scale: Tensor
    zero: Tensor
    global_scale: Tensor
    super_scale: Tensor
    weight = property(lambda self: self.qweight)

    def make_room(self, rows: int, columns: int, bits: int, group_size: int | None, format: str = "int") -> None:
        """Register the buffers, without data; `group_size` None is one group for all columns."""
        self.bits, self.format, groups = bits, format, columns // (group_size or columns)
        scale_type = {"int": torch.float16, "nvfp4": E4M3, "fp8": torch.bfloat16}.get(format, torch.uint8)
        self.register_buffer("qweight", torch.zeros(rows, packed_width(columns, bits), dtype=torch.int32))
        self.register_buffer("scale", torch.ones(rows, groups).to(scale_type))
        offsets = format in TWO_LEVELS and super_scales.TOPS[format][1] > 0
        if format == "int" or offsets:
            self.register_buffer("zero", torch.zeros(rows, groups, dtype=torch.uint8))
        for part in SUPER_PARTS[: 1 + offsets] if format in TWO_LEVELS else ():
            self.register_buffer(part, torch.ones(rows, columns // SUPER, dtype=torch.float16))
        if format == "nvfp4":
            self.register_buffer("global_scale", torch.ones(1))

    def grid(self, rows: slice | Tensor = slice(None)) -> tuple[Tensor, Tensor]:
        """Scales, float16 or float32, and zero points, uint8, or float32 of two levels, of integers as of
        `kernels.levels`; (rows, groups).

        Of FP8 the scales and zeros of its numbers themselves.
        """
        if self.format == "int":
            return self.scale[rows], self.zero[rows]
        if self.format == "fp8":
            return self.scale[rows].float(), torch.zeros_like(self.scale[rows], dtype=torch.uint8)
        if self.format in TWO_LEVELS:
            d, dmin = (None if part is None else part[rows] for part in map(self._buffers.get, SUPER_PARTS))
            m = None if dmin is None else self.zero[rows]
            assert d is not None
            return super_scales.grid(d, self.scale[rows], dmin, m, middle_of(2**self.bits - 1))
        scale = decode(self.scale[rows], self.format, self.global_scale if self.format == "nvfp4" else 1.0) / 2
        return scale, torch.full_like(scale, E2M1_ZERO, dtype=torch.uint8)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to(dtype)` comes here: the integers were chosen for exactly these scales, which stay as they are.
        kept = {name: getattr(self, name) for name in _KEPT if name in self._buffers}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            if (now := getattr(self, name)).dtype != tensor.dtype:
                setattr(self, name, tensor.to(now.device))
        return self
