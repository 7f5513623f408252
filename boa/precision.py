"""In which precision CUDA multiplies float32: TF32 where sums over tokens are formed, IEEE where they are solved.

TF32 keeps 11 bits of each factor and adds in float32, and runs at several times the speed. What it does to a sum over
tokens is what rounding the inputs of the layer to 11 bits would do: H_in = X X^T stays a Gram matrix, of inputs that
are off by at most 2^-11 of themselves, where activations are quantized to 4 bits and models are run in bfloat16, which
has 8. The solver is another matter. It carries E H_in along, updates it by differences, and compares losses that differ
in the fifth digit: there each product is IEEE. So is Y X^T - W H_in, the difference of two large products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def quick_products(device: torch.device) -> Iterator[None]:
    """Products of float32 on CUDA in TF32; elsewhere nothing changes. A context, or a decorator of a function."""
    with _products("high" if device.type == "cuda" else None):
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 as IEEE has them, inside `quick_products` too."""
    with _products("highest" if torch.cuda.is_available() else None):
        yield


@contextmanager
def _products(precision: str | None) -> Iterator[None]:
    if precision is None:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
