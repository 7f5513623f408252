"""Decoders with norms behind attention and MLP."""

from __future__ import annotations

from dataclasses import replace

from ..family import Family
from .row_parts import CAUSAL, Merged

_GEMMA2 = Family(
    "gemma2",
    note="norms after attention and MLP; windows of text begin with BOS; soft caps, windows",
    mlp_norm="pre_feedforward_layernorm",
    norm_offset=1.0,
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    scaled_embedding=True,
    bos=True,
    window="layers",
    legal=CAUSAL,
)
# Norms stand behind attention and MLP alone.
_POST_NORMS = Family(
    "",
    attention_norm="no_attention_norm",
    mlp_norm="no_mlp_norm",
    pre_norms=False,
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
)
ROWS = (
    _GEMMA2,
    replace(
        _GEMMA2,
        model_type="gemma3_text",
        note="norms after attention and MLP, QK-norm; windows of text begin with BOS; windows, RoPE by layer",
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        rope_by_layer=True,
        # Its attention ignores the field, so a model that sets it would not be the one that was trained.
        legal={**CAUSAL, "attn_logit_softcapping": (None,)},
    ),
    replace(
        _POST_NORMS,
        model_type="olmo2",
        head_norms_whole=True,
        note="norms behind attention and MLP alone; QK-norm over all heads, which H_out is pulled back through",
    ),
    replace(
        _POST_NORMS,
        model_type="olmo3",
        head_norms_whole=True,
        window="layers",
        rope_by_layer=True,
        note="as olmo2; windows, RoPE by layer",
    ),
    replace(
        _POST_NORMS,
        model_type="exaone4",
        window="layers",
        rope_layers="layer_types",
        note="norms behind attention and MLP alone; QK-norm; layers that see all positions have no RoPE",
    ),
    Family(
        "glm4",
        note="norms after attention and MLP; merged gate, up; partial RoPE of neighbouring channels; biases",
        attention_post_norm="post_self_attn_layernorm",
        mlp_post_norm="post_mlp_layernorm",
        gate="mlp.gate_up_proj.gate",
        up="mlp.gate_up_proj.up",
        merged=(Merged("mlp.gate_up_proj", {"gate": "ffn", "up": "ffn"}),),
        rope_neighbours=True,
    ),
)
