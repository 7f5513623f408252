"""Decoders whose attention compresses keys and values, and mostly queries: DeepSeek's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .mixture_rows import GLM4
from .row_parts import Merged, Variant

_PLAIN_QUERY: dict[str, Any] = {
    "query": "self_attn.q_proj",
    "compressions": ("self_attn.kv_a_proj_with_mqa",),
    "latents": ("self_attn.kv_b_proj.key", "self_attn.kv_b_proj.value"),
}


def _sizes(config: Any) -> dict[str, tuple[int, int]]:
    heads, hidden, latent = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
    queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    compressed = {"self_attn.q_proj": (queries, hidden)}
    if config.q_lora_rank is not None:
        compressed = {
            "self_attn.q_a_proj": (config.q_lora_rank, hidden),
            "self_attn.q_b_proj": (queries, config.q_lora_rank),
        }
    return compressed | {
        "self_attn.kv_a_proj_with_mqa": (latent + config.qk_rope_head_dim, hidden),
        "self_attn.kv_b_proj.key": (heads * config.qk_nope_head_dim, latent),
        "self_attn.kv_b_proj.value": (heads * config.v_head_dim, latent),
    }


_DEEPSEEK = replace(
    GLM4,
    model_type="deepseek_v3",
    note="queries, keys and values are compressed: layer objectives there, attention's for what reads the latents; "
    "the cache stays in 16 bits; checkpoints in FP8 are read; experts as of glm4_moe",
    query="self_attn.q_b_proj",
    key="self_attn.kv_b_proj.key",
    value="self_attn.kv_b_proj.value",
    compressions=("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    latents=("self_attn.q_b_proj", "self_attn.kv_b_proj.key", "self_attn.kv_b_proj.value"),
    merged=(Merged("self_attn.kv_b_proj", {"key": "", "value": ""}, groups="query_heads"),),
    head_field="v_head_dim",
    packed="fp8",
    measured=_sizes,
    variants=(Variant({"q_lora_rank": None}, _PLAIN_QUERY),),
)
ROWS = (
    _DEEPSEEK,
    replace(
        _DEEPSEEK,
        model_type="deepseek_v2",
        note="as deepseek_v3, without the bias that chooses experts; Lite: queries are not compressed",
        exact=(),
        rope_neighbours=True,
        further_blocks="",
    ),
)
