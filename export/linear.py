"""A linear layer that stays packed in memory and is dequantized as it computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..boa.transforms import InputTransform
from .packing import packed_width, unpack


class QuantizedLinear(nn.Module):
    """y = dequantize(qweight) transform(x) + bias.

    Buffers, as in the files: `qweight` (out, words) int32, `scale` (out, groups) float16, `zero` (out, groups) uint8;
    the weight is `scale * (integer - zero)`. `bias` (out,) where the original has one.
    """

    qweight: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bits: int,
        group_size: int | None = None,
        bias: bool = False,
        transform: InputTransform | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = inputs, outputs, bits
        groups = inputs // (group_size or inputs)
        self.transform = transform or InputTransform()
        self.register_buffer("qweight", torch.zeros(outputs, packed_width(inputs, bits), dtype=torch.int32))
        self.register_buffer("scale", torch.ones(outputs, groups, dtype=torch.float16))
        self.register_buffer("zero", torch.zeros(outputs, groups, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False) if bias else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # `model.to(dtype)` comes here: the integers were chosen for exactly these scales, which stay float16.
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """(out, in) weights, computed in float32 and rounded to `dtype`."""
        integers = unpack(self.qweight, self.bits, self.in_features).float()
        parts = integers.unflatten(1, (self.scale.shape[1], -1))
        weight = (parts - self.zero.float()[..., None]) * self.scale.float()[..., None]
        return weight.flatten(1).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return nn.functional.linear(self.transform(x), self.dequantize(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, groups={self.scale.shape[1]}"
