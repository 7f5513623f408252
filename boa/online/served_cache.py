"""Key/value caches as runtimes have them: they turn vectors themselves, round them, and turn them back as they read.

Attention is the same whether queries are turned too or keys turned back, so a cache is here what it makes of a key or a
value, with neither rotation of ours beside it. Read in the sources of vLLM 0.32.0 (`int4_per_token_head`,
`int8_per_token_head`) and of llama.cpp as llama-cpp-python 0.3.36 has it (`llama_kv_cache`, `quantize_row_q4_0`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...rotation.hadamard import Hadamard

OWN = "rotoboa"
SERVERS = (OWN, "vllm", "llama.cpp")
"""Who keeps the keys and values of a served model, and so how they are rounded."""
BITS = {"vllm": (4, 8), "llama.cpp": (4, 5, 8)}
"""Of keys and values. vLLM has both in one width."""
BLOCK = 32
"""Numbers that share a scale in llama.cpp; a head's width is a multiple of it."""
NEIGHBOURS = ("llama", "mistral", "mixtral")
"""Types of models whose RoPE turns neighbours in llama.cpp, and halves in transformers: so its queries and keys lie in
another order."""
_SEED = 0x9E3779B9  # vLLM's, of the signs
_LEAST = 1e-6  # vLLM's least scale, of vectors that are turned and not yet divided by the root of their width
_TURNED = 64  # llama.cpp turns heads of multiples of this alone, and values in blocks of it


@dataclass(frozen=True)
class ServedQuantizer:
    """What the cache of a runtime makes of vectors (..., head_dim), each of a token in a head.

    | server | bits | turned by | rounded |
    |---|---|---|---|
    | vllm | 4 | H D in blocks of the largest power of two, D: signs | by token, (max - min) / 15, a zero point |
    | vllm | 8 | nothing | by token, max abs / 127 |
    | llama.cpp | 4, 5 | H; keys in blocks as above, values in blocks of 64 | by 32, the largest is level -2^(b-1) |
    | llama.cpp | 8 | the same | by 32, max abs / 127 |

    Not followed: vLLM keeps a zero point in the last four bits of a scale's mantissa, and its kernels on GPUs turn in
    16 bits; llama.cpp rounds queries to 8 bits where it multiplies by quantized keys on a processor.

    Attributes:
        server: of `SERVERS`, not `OWN`.
        bits: of `BITS`.
        head_dim: width of a vector.
        of_keys: of keys; of values if not.
        neighbours: they lie there in the order of `NEIGHBOURS`.
    """

    server: str
    bits: int
    head_dim: int
    of_keys: bool
    neighbours: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """`x` rounded and read again, in its own dtype; computed in float32 or wider."""
        wide = x if x.dtype == torch.float64 else x.float()
        there = wide.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if self.neighbours else wide
        read = self.turned_back(self._rounded(self.turned(there)))
        return (read.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if self.neighbours else read).to(x.dtype)

    @property
    def rotation(self) -> Hadamard | None:
        """What it turns vectors by, without signs; None where it does not."""
        if self.server == "vllm":
            return Hadamard.of(self.head_dim, powers=True) if self.bits == 4 else None
        if self.head_dim % _TURNED:
            return None
        return Hadamard.of(self.head_dim, powers=True) if self.of_keys else Hadamard(self.head_dim, _TURNED, 1)

    def turned(self, x: Tensor) -> Tensor:
        """`x` as it is rounded."""
        rotation = self.rotation
        if rotation is None:
            return x
        return rotation.apply(x * self._signs(rotation, x) if self.server == "vllm" else x)

    def turned_back(self, x: Tensor) -> Tensor:
        """The inverse."""
        rotation = self.rotation
        if rotation is None:
            return x
        y = rotation.apply_transposed(x)
        return y * self._signs(rotation, x) if self.server == "vllm" else y

    def _signs(self, rotation: Hadamard, x: Tensor) -> Tensor:
        """The same in each block."""
        return _signs(rotation.order).to(x.device, x.dtype).repeat(rotation.blocks)

    def _rounded(self, x: Tensor) -> Tensor:
        if self.server == "llama.cpp":
            return self._by_block(x.unflatten(-1, (-1, BLOCK))).flatten(-2)
        if self.bits == 8:
            scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(_LEAST)
            return _half_up(x / scale).clamp(-128, 127) * scale
        low, high = x.aminmax(dim=-1, keepdim=True)
        rotation = self.rotation
        assert rotation is not None
        scale = ((high - low) / 15).clamp_min(_LEAST / rotation.order**0.5)
        zero = _half_up(-low / scale).clamp(0, 15)  # not of a range with zero in it
        return (_half_up(x / scale + zero).clamp(0, 15) - zero) * scale

    def _by_block(self, x: Tensor) -> Tensor:
        if self.bits == 8:
            scale = x.abs().amax(-1, keepdim=True) / 127
            return _half_up(_divided(x, scale)) * scale.half().to(x.dtype)
        middle = 2 ** (self.bits - 1)
        largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))  # with its sign
        scale = largest / -middle
        levels = (_divided(x, scale) + middle + 0.5).floor().clamp_max(2 * middle - 1)
        return (levels - middle) * scale.half().to(x.dtype)


@lru_cache(maxsize=8)
def _signs(size: int) -> Tensor:
    """Of vLLM, whose cache draws them anew in every process: +-1, (size,) float32."""
    with torch.inference_mode(False):
        generator = torch.Generator(device="cpu").manual_seed(_SEED)
        return 2 * torch.bernoulli(torch.full((size,), 0.5), generator=generator) - 1


def _half_up(x: Tensor) -> Tensor:
    """To the nearest integer, halves away from zero, as a cast does after half is added."""
    return torch.where(x >= 0, (x + 0.5).floor(), (x - 0.5).ceil())


def _divided(x: Tensor, scale: Tensor) -> Tensor:
    """Zero where the scale is."""
    return torch.where(scale == 0, torch.zeros_like(x), x / torch.where(scale == 0, 1, scale))
