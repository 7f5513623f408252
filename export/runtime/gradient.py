"""The gradient of a packed layer: what is packed stays, and adapters below and beside it can be trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


class _Product(torch.autograd.Function):
    """Computes with rounded inputs and integers; its gradient is that of the weights, the rounding left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product, weight: Callable[[torch.dtype], Tensor]) -> Tensor:
        """(..., in) -> (..., out)."""
        ctx.weight = weight
        return product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """(..., out) -> (..., in); the weights are unpacked for the while."""
        (gradient,) = gradients
        return gradient @ ctx.weight(gradient.dtype), None, None


def with_gradient(x: Tensor, product: Product, weight: Callable[[torch.dtype], Tensor]) -> Tensor:
    """product(x), (..., in) -> (..., out), whose gradient is that of x @ weight^T where one is asked for.

    Rounding has a gradient of 0 and integers have none: of the products themselves adapters would learn nothing.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Product.apply(x, product, weight)
        return result
    return product(x)
