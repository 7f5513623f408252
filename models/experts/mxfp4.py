"""Weights in MXFP4 as checkpoints of gpt-oss hold them, read as the numbers that they mean.

A row lies in blocks of 32 numbers of E2M1, two in a byte, the first in its low half; each block has a byte e, and is
worth 2^(e - 127) times its numbers. bfloat16 holds the products exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
BLOCKS, SCALES = "_blocks", "_scales"
"""How the names of the two tensors end."""
_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantized(blocks: Tensor, scales: Tensor) -> Tensor:
    """(..., blocks of a row, 16) and (..., blocks of a row), both uint8 -> (..., columns) in bfloat16."""
    levels = torch.tensor([*_LEVELS, *(-level for level in _LEVELS)], dtype=torch.bfloat16)
    pairs = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    exponents = scales.to(torch.int32)[..., None] - 127
    return torch.ldexp(levels[pairs.to(torch.int32)], exponents).flatten(-2)
