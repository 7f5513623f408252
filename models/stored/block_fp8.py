"""Weights in FP8 with a scale for each block of 128 x 128, as DeepSeek's checkpoints hold them, read as numbers.

A weight (r, c) lies as E4M3 beside `weight_scale_inv`, (ceil(r / 128), ceil(c / 128)), by which its blocks are
multiplied; blocks at the edges are smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError

METHOD, BLOCK, SCALE, DTYPE = "fp8", 128, "_scale_inv", "F8_E4M3"
Place = tuple[Path, str]
"""File and name of a stored tensor."""


def is_readable(quantization: Mapping[str, Any], packed: str) -> bool:
    """Whether a `quantization_config` is one that a family's checkpoints may have, whose `packed` says which."""
    method = quantization.get("quant_method")
    if not packed or method != packed:
        return False
    return method != METHOD or quantization.get("weight_block_size") == [BLOCK, BLOCK]


def take_scales(stored: dict[str, Place]) -> dict[str, Place]:
    """Where the scales are, by the names of their weights; they are no tensors of the model, and leave `stored`."""
    names = [name for name in stored if name.endswith(f".weight{SCALE}")]
    return {name.removesuffix(SCALE): stored.pop(name) for name in names}


def dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    """(r, c) in E4M3 and (blocks of rows, blocks of columns) -> (r, c) in float32, exact but for the last bit."""
    rows, columns = weight.shape
    wide = scale.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return weight.float() * wide


def check_scale(what: str, scale: tuple[int, ...], weight: torch.Size) -> None:
    """Check the shape of a scale against that of its weight; `what` names the weight in errors.

    Raises:
        InputError: they do not belong together.
    """
    expected = tuple(-(-size // BLOCK) for size in weight)
    if scale != expected:
        raise InputError(
            f"{what} has scales of shape {scale}, and blocks of {BLOCK} x {BLOCK} ask for {expected}: download it "
            "again."
        )
