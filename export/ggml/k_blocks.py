"""Super-blocks of 256 weights as llama.cpp's K types pack them: see `super_scales` for what they mean.

| type | bytes of a super-block |
|---|---|
| Q2_K | 16 of sc and m, a half each, 64 of q, d, dmin |
| Q3_K | 32 of the third bits of q, of weight i in bit i / 32 of byte i % 32, 64 of the others, 12 of sc + 32, d |
| Q4_K | d, dmin, 12 of sc and m, 128 of q: of 64 weights the first 32 in low halves, the others in high ones |
| Q5_K | d, dmin, 12 of sc and m, 32 of fifth bits, of group g in bit g, 128 as above |
| Q6_K | 128 of four bits of q, 64 of its two upper bits, 16 of sc, d |

Two bits of q are those of four lanes of 32 weights in each half, the first one lowest.

Of 16 sc + 32 in Q3_K, bytes 0 to 7 are the lower four bits, of the last eight in high halves, and bytes 8 to 11 the
upper two of every fourth one. Of 8 sc and 8 m, 6 bits each, bytes 0 to 3 are the first four sc, with upper bits of the
last four above; 4 to 7 the same of m; 8 to 11 the lower four bits of the last four, sc in the low half.
"""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from ...boa import super_scales
from ...boa.scheme import SUPER
from ...boa.solver.rounding import Quantized
from .gguf_blocks import Array

NAMES = {"q2_k": Type.Q2_K, "q3_k": Type.Q3_K, "q4_k": Type.Q4_K, "q5_k": Type.Q5_K, "q6_k": Type.Q6_K}


def to_super_blocks(result: Quantized, name: str) -> Array:
    """One projection: integers (out, in), scale and zero (out, groups) of the format `name` -> (out, bytes) uint8.

    Raises:
        ValueError: the scales are not of two levels.
    """
    rows = len(result.integers)
    q = result.integers.numpy().reshape(rows, -1, SUPER)
    d, sc, dmin, m = super_scales.parts_of(result.scale, result.zero, name)
    scales = _bytes(sc, d)
    halves = q.reshape(rows, -1, 2, 4, 32)
    offsets = None if m is None else _bytes(m, d)
    if name == "q2_k":
        assert dmin is not None and offsets is not None
        parts = [scales | (offsets << 4), _lanes(halves).reshape(rows, -1, 64), _half(d), _half(dmin)]
    elif name == "q3_k":
        third = q.reshape(rows, -1, 8, 32) >> 2 << np.arange(8, dtype=np.uint8)[:, None]
        above = scales + np.uint8(32)
        fours = (above >> 4).reshape(rows, -1, 4, 4)
        upper = np.bitwise_or.reduce(fours << np.array([0, 2, 4, 6], np.uint8)[:, None], -2)
        lower = (above[..., :8] & 15) | ((above[..., 8:] & 15) << 4)
        two = _lanes(halves & 3).reshape(rows, -1, 64)
        parts = [np.bitwise_or.reduce(third, -2), two, lower, upper, _half(d)]
    elif dmin is None or offsets is None:
        low = (halves[..., :2, :] & 15) | ((halves[..., 2:, :] & 15) << 4)
        parts = [low.reshape(rows, -1, 128), _lanes(halves >> 4).reshape(rows, -1, 64), scales, _half(d)]
    else:
        first, last = [p[..., :4] for p in (scales, offsets)], [p[..., 4:] for p in (scales, offsets)]
        packed = [f | (z >> 4 << 6) for f, z in zip(first, last, strict=True)] + [(last[0] & 15) | (last[1] << 4)]
        pairs = q.reshape(rows, -1, 4, 2, 32)
        low = (pairs[..., 0, :] & 15) | ((pairs[..., 1, :] & 15) << 4)
        parts = [_half(d), _half(dmin), *packed]
        if name == "q5_k":
            fifth = q.reshape(rows, -1, 8, 32) >> 4 << np.arange(8, dtype=np.uint8)[:, None]
            parts.append(np.bitwise_or.reduce(fifth, -2))
        parts.append(low.reshape(rows, -1, 128))
    return np.concatenate(parts, -1).reshape(rows, -1)


def _lanes(values: Array) -> Array:
    """(..., 4, 32) of two bits -> (..., 32)."""
    found: Array = np.bitwise_or.reduce(values << np.array([0, 2, 4, 6], np.uint8)[:, None], -2)
    return found


def _bytes(values: Tensor, d: Tensor) -> Array:
    """(rows, groups) -> (rows, super-blocks, groups of each)."""
    found: Array = values.numpy().astype(np.uint8).reshape(*d.shape, -1)
    return found


def _half(values: Tensor) -> Array:
    found: Array = values.half().numpy()[..., None].view(np.uint8)
    return found
