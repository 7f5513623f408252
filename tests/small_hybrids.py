"""Small decoders with something else than attention in some blocks, as in `small_families`."""

from typing import Any

_HYBRID: dict[str, Any] = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 12,
}
_THREE_AXES: dict[str, Any] = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [1, 2, 1],
}
_SHARED: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 64,
}
_GRANITE: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "shared_intermediate_size": 48,
    "mamba_n_heads": 4,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
SMALL_HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**_HYBRID, "rope_parameters": _THREE_AXES},
    "qwen3_5_moe_text": {**_HYBRID, **_SHARED, "rope_parameters": _THREE_AXES},
    "qwen3_next": {**_HYBRID, **_SHARED, "partial_rotary_factor": 0.5},
    "granitemoehybrid": {**_GRANITE, "num_local_experts": 0, "tie_word_embeddings": True},
    "granitemoehybrid-experts": {
        **_GRANITE,
        "model_type": "granitemoehybrid",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention"],
        "conv_bias": True,
        "block_multiple_of": 16,
        "intermediate_size": 56,
        "tie_word_embeddings": True,
    },
}
