"""Super-blocks of 256 weights as llama.cpp's K types pack them: see `super_scales` for what they mean.

| type | bytes of a super-block |
|---|---|
| Q4_K | d, dmin, 12 of sc and m, 128 of q: of 64 weights the first 32 in low halves, the others in high ones |
| Q5_K | d, dmin, 12 of sc and m, 32 of fifth bits, of group g in bit g, 128 as above |
| Q6_K | 128 of four bits of q, 64 of its two upper bits, 16 of sc, d |

Of 8 sc and 8 m, 6 bits each: bytes 0 to 3 are the first four sc, with upper bits of the last four above; 4 to 7 the
same of m; 8 to 11 the lower four bits of the last four, sc in the low half.
"""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from ...boa import super_scales
from ...boa.scheme import SUPER
from ...boa.solver.rounding import Quantized
from .gguf_blocks import Array

NAMES = {"q4_k": Type.Q4_K, "q5_k": Type.Q5_K, "q6_k": Type.Q6_K}


def to_super_blocks(result: Quantized, name: str) -> Array:
    """One projection: integers (out, in), scale and zero (out, groups) of the format `name` -> (out, bytes) uint8.

    Raises:
        ValueError: the scales are not of two levels.
    """
    rows = len(result.integers)
    q = result.integers.numpy().reshape(rows, -1, SUPER)
    d, sc, dmin, m = super_scales.parts_of(result.scale, result.zero, name)
    scales = _bytes(sc, d)
    if dmin is None or m is None:
        halves = q.reshape(rows, -1, 2, 4, 32)  # of 128 weights, four lanes of 32
        low = (halves[..., :2, :] & 15) | ((halves[..., 2:, :] & 15) << 4)
        upper = halves >> 4
        high = upper[..., 0, :] | (upper[..., 1, :] << 2) | (upper[..., 2, :] << 4) | (upper[..., 3, :] << 6)
        parts = [low.reshape(rows, -1, 128), high.reshape(rows, -1, 64), scales, _half(d)]
    else:
        offsets = _bytes(m, d)
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


def _bytes(values: Tensor, d: Tensor) -> Array:
    """(rows, groups) -> (rows, super-blocks, groups of each)."""
    found: Array = values.numpy().astype(np.uint8).reshape(*d.shape, -1)
    return found


def _half(values: Tensor) -> Array:
    found: Array = values.half().numpy()[..., None].view(np.uint8)
    return found
