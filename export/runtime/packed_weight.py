"""What every layer with a packed weight holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from ..packing import packed_width


class PackedWeight(nn.Module):
    """Buffers, as in the files: `qweight` (rows, words) int32, `scale` (rows, groups) float16, `zero` (rows, groups)
    uint8; a value is `scale * (integer - zero)`. What others read of `weight`, its device and whether it learns, is
    that of the packed words.
    """

    qweight: Tensor
    scale: Tensor
    zero: Tensor
    weight = property(lambda self: self.qweight)

    def make_room(self, rows: int, columns: int, bits: int, group_size: int | None) -> None:
        """Register the buffers, without data; `group_size` None is one group for all columns."""
        self.bits, groups = bits, columns // (group_size or columns)
        self.register_buffer("qweight", torch.zeros(rows, packed_width(columns, bits), dtype=torch.int32))
        self.register_buffer("scale", torch.ones(rows, groups, dtype=torch.float16))
        self.register_buffer("zero", torch.zeros(rows, groups, dtype=torch.uint8))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to(dtype)` comes here: the integers were chosen for exactly these scales, which stay float16.
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self
