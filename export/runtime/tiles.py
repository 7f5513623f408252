"""Four-bit weights as torch's own product for processors reads them: ten times faster than they unpack, of few tokens.

    aten::_weight_int4pack_mm_for_cpu: y = x w^T, w = (integer - 8) * scale + offset; all but the sums are bfloat16

Words are put into this order in place of the files', so that a layer holds its integers once. With AVX-512 a tile is 64
rows: of each column 32 bytes, whose lower halves are rows 0 to 31. Others have other orders, and are left alone.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..packing import unpack

ROWS = 64
"""Of a tile."""
TOKENS = 32
"""With more of them unpacking is faster, as seen; at 16 it took twice the time, at 64 four fifths."""
GROUPS = (256, 128, 64, 32)
"""Weights to a scale that the product knows."""


def group_of(rows: int, columns: int, groups: int) -> int | None:
    """Weights to a scale in the product, of a matrix with so many groups a row; None where it cannot be taken."""
    width = columns // groups
    return next((size for size in GROUPS if width % size == 0), None) if rows % ROWS == 0 and available() else None


@cache
def available() -> bool:
    """Whether this processor has the product, and in the order that is known here."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    integers = torch.arange(ROWS * 32).remainder_(15).view(ROWS, 32).to(torch.uint8)
    return torch.equal(untiled(_tiled(integers)), integers)


def tiled(words: Tensor, columns: int) -> Tensor:
    """Words of `packing.pack`, (rows, words) int32 -> (rows / 64, columns, 32) uint8."""
    step = max(1, (1 << 22) // (columns * ROWS)) * ROWS  # integers are there as int32 in between
    return torch.cat([_tiled(unpack(words[i : i + step], 4, columns)) for i in range(0, len(words), step)])


def _tiled(integers: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.to(torch.int32), 1)
    return packed.view(-1, integers.shape[1], ROWS // 2)


def untiled(tiles: Tensor) -> Tensor:
    """The integers, (rows, columns) uint8."""
    halves = torch.stack([tiles & 15, tiles >> 4], 1)
    return halves.transpose(2, 3).flatten(0, 2)


def grid_of(scale: Tensor, zero: Tensor, columns: int, group: int) -> Tensor:
    """Scales and zero points, (rows, groups) -> (columns / group, rows, 2) bfloat16: scale, and offset."""
    scale = scale.float()
    both = torch.stack([scale, scale * (8 - zero.float())], -1)
    return both.repeat_interleave(columns // group // scale.shape[1], 1).transpose(0, 1).contiguous().bfloat16()


def product(x: Tensor, tiles: Tensor, grid: Tensor) -> Tensor:
    """(T, columns) bfloat16 -> (T, rows)."""
    packed = tiles.view(len(tiles) * ROWS, -1)
    found: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), packed, x.shape[1] // len(grid), grid)
    return found
