"""Mixtures of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..family import Family


def by_steps(config: Any, index: int) -> bool:
    """Dense where Qwen's list has the block, and where the step to the next mixture passes it."""
    named = index in (getattr(config, "mlp_only_layers", None) or ())
    return named or config.num_experts == 0 or (index + 1) % config.decoder_sparse_step != 0


_EXPERTS = Family(
    "",
    gate="mlp.experts.{}.gate_proj",
    up="mlp.experts.{}.up_proj",
    down="mlp.experts.{}.down_proj",
    experts="mlp.experts",
    router="mlp.gate",
    window="all",
    note="each expert is calibrated on its tokens; one with fewer than input channels on the layer's, and the report's "
    "`notices` name it; the router stays as it is",
)
ROWS = (
    replace(
        _EXPERTS,
        model_type="mixtral",
        experts_field="num_local_experts",
        renamed=(
            (r"\.block_sparse_moe\.gate\.", ".mlp.gate."),
            (r"\.block_sparse_moe\.experts\.(\d+)\.w1\.", r".mlp.experts.\1.gate_proj."),
            (r"\.block_sparse_moe\.experts\.(\d+)\.w3\.", r".mlp.experts.\1.up_proj."),
            (r"\.block_sparse_moe\.experts\.(\d+)\.w2\.", r".mlp.experts.\1.down_proj."),
        ),
    ),
    replace(
        _EXPERTS,
        model_type="qwen3_moe",
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        ffn_field="moe_intermediate_size",
        experts_field="num_experts",
        dense=by_steps,
    ),
    replace(
        _EXPERTS,
        model_type="qwen2_moe",
        note=f"a shared expert with a gate of its own; dense blocks where the config has them; {_EXPERTS.note}",
        shared="mlp.shared_expert",
        shared_gate="mlp.shared_expert_gate",
        shared_fields=("shared_expert_intermediate_size",),
        ffn_field="moe_intermediate_size",
        experts_field="num_experts",
        window="layers",
        dense=by_steps,
    ),
    replace(
        _EXPERTS,
        model_type="olmoe",
        note=f"QK-norm over all heads; {_EXPERTS.note}",
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        head_norms_whole=True,
        experts_field="num_experts",
        window=None,
        legal={"clip_qkv": (None,)},
    ),
)
