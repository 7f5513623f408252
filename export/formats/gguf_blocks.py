"""Blocks of 32 weights as GGUF packs them, and which of its types holds which integers.

| type | weights | a block of 32 weights | a weight |
|---|---|---|---|
| Q4_0 | symmetric, 4 bits | d, 16 bytes | d * (q - 8) |
| Q4_1 | asymmetric, 4 bits | d, m, 16 bytes | d * q + m |
| Q5_0 | symmetric, 5 bits | d, 4 bytes of fifth bits, 16 bytes | d * (q - 16) |
| Q5_1 | asymmetric, 5 bits | d, m, 4 bytes of fifth bits, 16 bytes | d * q + m |
| Q8_0 | symmetric, 8 bits | d, 32 signed bytes | d * q |

d and m are float16. The 16 bytes hold four bits of value i in the low half of byte i, and of value i + 16 in the high
half; the fifth bit of value i is bit i of the four bytes.

d is the run's scale, which is float16 too. m is `-d * zero` rounded to float16: its error is at most m / 2048, so 0.7 %
of a step (d) in Q4_1 and 1.5 % in Q5_1, and nothing where the zero point is a power of two. The other types are exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from ...boa.solver.rounding import Quantized

BLOCK = 32
TYPES = {(4, True): Type.Q4_0, (4, False): Type.Q4_1, (5, True): Type.Q5_0, (5, False): Type.Q5_1, (8, True): Type.Q8_0}
"""Bits, and whether weights are symmetric -> the type that holds them."""

_OFFSET = (Type.Q4_1, Type.Q5_1)
_FIFTH = (Type.Q5_0, Type.Q5_1)
Array = np.ndarray[Any, Any]


def to_blocks(result: Quantized, kind: Type) -> Array:
    """One projection: integers (out, in), scale and zero (out, groups) -> (out, bytes) uint8 in a type of the table."""
    rows, columns = result.integers.shape
    integers = result.integers.view(rows, -1, BLOCK).numpy()
    repeat = columns // BLOCK // result.scale.shape[1]
    parts = [_half(result.scale, repeat)]
    if kind in _OFFSET:
        parts.append(_half(-result.scale.double() * result.zero, repeat))
    if kind == Type.Q8_0:
        parts.append(integers ^ 128)  # less 128, as two's complement
    else:
        if kind in _FIFTH:
            parts.append(np.packbits(integers >> 4, -1, "little"))
        parts.append((integers[..., :16] & 15) | (integers[..., 16:] << 4))
    return np.concatenate(parts, -1).reshape(rows, -1)


def _half(values: Tensor, repeat: int) -> Array:
    """(rows, groups) -> (rows, groups * repeat, 2): a float16 for each block, as bytes."""
    half: Array = values.half().repeat_interleave(repeat, 1).numpy()[..., None].view(np.uint8)
    return half
