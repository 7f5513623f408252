"""Decoders that read as Llama does: RMSNorm before attention and MLP, one after the other."""

from __future__ import annotations

from ..family import Family
from .row_parts import CAUSAL, Merged

ROWS = (
    Family("llama", note="1 to 3.3: RoPE scaling, tied embeddings, biases of attention and MLP"),
    Family("mistral", window="all", note="sliding window"),
    Family("qwen2", window="layers", note="and 2.5: biases of q, k and v; sliding window in some layers"),
    Family(
        "qwen3",
        window="layers",
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        note="QK-norm, which H_out is pulled back through; heads wider than hidden / heads",
    ),
    Family(
        "phi3",
        note="to 4-mini: merged q, k, v and gate, up are quantized apart; partial RoPE and longrope",
        query="self_attn.qkv_proj.query",
        key="self_attn.qkv_proj.key",
        value="self_attn.qkv_proj.value",
        gate="mlp.gate_up_proj.gate",
        up="mlp.gate_up_proj.up",
        window="all",
        merged=(
            Merged("self_attn.qkv_proj", {"query": "query_width", "key": "key_width", "value": "key_width"}),
            Merged("mlp.gate_up_proj", {"gate": "ffn", "up": "ffn"}),
        ),
    ),
    Family(
        "gemma",
        norm_offset=1.0,
        scaled_embedding=True,
        bos=True,
        legal=CAUSAL,
        note="no norms after attention and MLP, which its successors have; windows of text begin with BOS",
    ),
    Family("seed_oss", note="biases of q, k, v and o"),
    Family("ministral3", window="all", note="queries grow with far positions; sliding window"),
    Family(
        "smollm3",
        window="layers",
        rope_layers="no_rope_layers",
        note="layers without RoPE: their objectives have none either",
    ),
    Family(
        "granite",
        note="factors of embedding, branches, attention and logits stay where they are",
        embedding_factor="embedding_multiplier",
        branch_factor="residual_multiplier",
        logits_divisor="logits_scaling",
    ),
    Family("ernie4_5", rope_neighbours=True, note="RoPE of neighbouring channels; biases"),
    Family(
        "hunyuan_v1_dense",
        note="QK-norm after RoPE",
        query_norm="self_attn.query_layernorm",
        key_norm="self_attn.key_layernorm",
        head_norms_last=True,
    ),
)
