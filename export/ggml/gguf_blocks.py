"""Blocks of weights as GGUF packs them, and which of its types holds which integers.

| type | weights | a block | a weight |
|---|---|---|---|
| Q2_0 | symmetric, 2 bits | of 64: d, 16 bytes | d * (q - 1) |
| Q4_0 | symmetric, 4 bits | of 32: d, 16 bytes | d * (q - 8) |
| Q4_1 | asymmetric, 4 bits | d, m, 16 bytes | d * q + m |
| Q5_0 | symmetric, 5 bits | d, 4 bytes of fifth bits, 16 bytes | d * (q - 16) |
| Q5_1 | asymmetric, 5 bits | d, m, 4 bytes of fifth bits, 16 bytes | d * q + m |
| Q8_0 | symmetric, 8 bits | d, 32 signed bytes | d * q |

d and m are float16. The 16 bytes hold four bits of value i in the low half of byte i, and of value i + 16 in the high
half; the fifth bit of value i is bit i of the four bytes. Those of Q2_0 hold four values each, the first one lowest.

d is the run's scale, which is float16 too. m is `-d * zero` rounded to float16: its error is at most m / 2048, so 0.7 %
of a step (d) in Q4_1 and 1.5 % in Q5_1, and nothing where the zero point is a power of two. The other types are exact.
Q2_0 has the levels -1 to 2, and a run -2 to 1: they are the same with d less than zero and q' = 3 - q.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from ...boa.solver.rounding import Quantized


def _added(name: str, value: int, sizes: tuple[int, int]) -> Type:
    """A type that llama.cpp has, and the gguf package from some release on: its reader and its writer learn of it."""
    if name in Type.__members__:
        return Type[name]
    kind = int.__new__(Type, value)
    kind._name_, kind._value_ = name, value
    Type._value2member_map_[value] = kind
    GGML_QUANT_SIZES[kind] = sizes
    return kind


Q2_0 = _added("Q2_0", 42, (64, 18))
TYPES = {
    (2, True): Q2_0, (4, True): Type.Q4_0, (4, False): Type.Q4_1, (5, True): Type.Q5_0, (5, False): Type.Q5_1,
    (8, True): Type.Q8_0,
}  # fmt: skip
"""Bits, and whether weights are symmetric -> the type that holds them."""

_OFFSET = (Type.Q4_1, Type.Q5_1)
_FIFTH = (Type.Q5_0, Type.Q5_1)
Array = np.ndarray[Any, Any]


def block_of(kind: Type) -> int:
    """How many weights of a row are packed together."""
    return GGML_QUANT_SIZES[kind][0]


def to_blocks(result: Quantized, kind: Type) -> Array:
    """One projection: integers (out, in), scale and zero (out, groups) -> (out, bytes) uint8 in a type of the table."""
    rows, columns = result.integers.shape
    block = block_of(kind)
    integers = result.integers.view(rows, -1, block).numpy()
    repeat = columns // block // result.scale.shape[1]
    parts = [_half(-result.scale if kind == Q2_0 else result.scale, repeat)]
    if kind in _OFFSET:
        parts.append(_half(-result.scale.double() * result.zero, repeat))
    if kind == Type.Q8_0:
        parts.append(integers ^ 128)  # less 128, as two's complement
    elif kind == Q2_0:
        four = (3 - integers).reshape(rows, -1, block // 4, 4)
        parts.append(four[..., 0] | (four[..., 1] << 2) | (four[..., 2] << 4) | (four[..., 3] << 6))
    else:
        if kind in _FIFTH:
            parts.append(np.packbits(integers >> 4, -1, "little"))
        parts.append((integers[..., :16] & 15) | (integers[..., 16:] << 4))
    return np.concatenate(parts, -1).reshape(rows, -1)


def from_q2_0(data: Array) -> Array:
    """Q2_0, (..., bytes) uint8 -> (..., in) float32, which the gguf package 0.19 does not unpack."""
    blocks = data.reshape(*data.shape[:-1], -1, 18)
    d = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    q = (blocks[..., 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    weights: Array = d * (q.reshape(*q.shape[:-2], 64).astype(np.float32) - 1)
    return weights.reshape(*data.shape[:-1], -1)


def _half(values: Tensor, repeat: int) -> Array:
    """(rows, groups) -> (rows, groups * repeat, 2): a float16 for each block, as bytes."""
    half: Array = values.half().repeat_interleave(repeat, 1).numpy()[..., None].view(np.uint8)
    return half
