"""What vLLM's own kernels store of keys and values, run on a processor by Triton's interpreter. Knows no rotoboa.

    .venv-vllm/bin/python -I benchmarks/vllm_cache.py INPUT OUTPUT

INPUT: a safetensors file with `x`, (tokens, heads, head_dim) float32. OUTPUT: the same with `int4` and `int8`, what the
caches int4_per_token_head and int8_per_token_head hold of it, read and turned back in float32.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"
import torch
from safetensors.torch import load_file, save_file
from triton.backends import backends

# vLLM leaves Triton out where no backend is for its platform; the interpreter needs none.
backends.setdefault("cpu", SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True)))
BLOCK = 16


def stored(x: torch.Tensor, bits: int) -> torch.Tensor:
    """What the cache gives back of `x`."""
    from vllm.v1.attention.ops import int4_per_token_head as int4
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import (
        triton_reshape_and_cache_flash_per_token_head_quant,
    )
    from vllm.v1.kv_cache_interface import KVQuantMode

    tokens, heads, width = x.shape
    blocks = -(-tokens // BLOCK)
    kind, packed = (torch.uint8, width // 2) if bits == 4 else (torch.int8, width)
    cache, scales = torch.zeros(2, blocks, BLOCK, heads, packed, dtype=kind), torch.zeros(2, blocks, BLOCK, heads)
    slots = torch.arange(tokens)
    if bits == 4:
        int4.reshape_and_cache_int4(x, x, cache[0], cache[1], slots, k_scale_cache=scales[0], v_scale_cache=scales[1])
    else:
        triton_reshape_and_cache_flash_per_token_head_quant(
            x, x, cache[0], cache[1], scales[0], scales[1], slots, KVQuantMode.INT8_PER_TOKEN_HEAD
        )
    assert torch.equal(cache[0], cache[1])  # keys and values alike
    levels, scale = cache[0].flatten(0, 1)[:tokens], scales[0].flatten(0, 1)[:tokens, :, None]
    if bits == 8:
        return levels.float() * scale
    whole = torch.stack([levels & 0xF, levels >> 4], -1).flatten(-2).float()
    word = scale.contiguous().view(torch.int32)
    turned = (whole - (word & 0xF).float()) * (word & -16).view(torch.float32)
    return int4.single_rht(turned, inverse=True) / int4.largest_power_of_2_divisor(width)


if __name__ == "__main__":
    given = load_file(sys.argv[1])["x"]
    save_file({f"int{bits}": stored(given, bits).contiguous() for bits in (4, 8)}, sys.argv[2])
