"""Mixtures of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..family import Family
from .row_parts import Variant


def by_steps(config: Any, index: int) -> bool:
    """Dense where Qwen's list has the block, and where the step to the next mixture passes it."""
    named = index in (getattr(config, "mlp_only_layers", None) or ())
    return named or config.num_experts == 0 or (index + 1) % config.decoder_sparse_step != 0


def _first(config: Any, index: int) -> bool:
    """Dense where a block is among the first."""
    return bool(index < config.first_k_dense_replace)


def _unlisted(config: Any, index: int) -> bool:
    """Dense where the list of mixtures has no block."""
    return index not in config.moe_layers


def _between(config: Any, index: int) -> bool:
    """Dense where Ernie's first, last and step leave a block out."""
    inside = config.moe_layer_start_index <= index <= config.moe_layer_end_index
    return not inside or (index + 1) % config.moe_layer_interval != 0


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
_MIXTRAL = replace(
    _EXPERTS,
    model_type="mixtral",
    experts_field="num_local_experts",
    renamed=(
        (r"\.block_sparse_moe\.gate\.", ".mlp.gate."),
        (r"\.block_sparse_moe\.experts\.(\d+)\.w1\.", r".mlp.experts.\1.gate_proj."),
        (r"\.block_sparse_moe\.experts\.(\d+)\.w3\.", r".mlp.experts.\1.up_proj."),
        (r"\.block_sparse_moe\.experts\.(\d+)\.w2\.", r".mlp.experts.\1.down_proj."),
        (r"\.block_sparse_moe\.e_score_correction_bias$", ".mlp.e_score_correction_bias"),
    ),
)
GLM4 = replace(
    _EXPERTS,
    model_type="glm4_moe",
    note=f"a shared expert; a bias chooses experts; dense first blocks; partial RoPE; QK-norm in some; {_EXPERTS.note}",
    shared="mlp.shared_experts",
    shared_fields=("moe_intermediate_size", "n_shared_experts"),
    ffn_field="moe_intermediate_size",
    experts_field="n_routed_experts",
    window=None,
    dense=_first,
    exact=("e_score_correction_bias",),
    further_blocks="num_nextn_predict_layers",
    variants=(Variant({"use_qk_norm": True}, {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}),),
)
ROWS = (
    _MIXTRAL,
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
    GLM4,
    replace(
        GLM4,
        model_type="dots1",
        note=f"a shared expert; a bias chooses experts; dense first blocks; QK-norm; windows; {_EXPERTS.note}",
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        window="layers",
        variants=(),
    ),
    replace(
        _EXPERTS,
        model_type="ernie4_5_moe",
        note="shared experts, merged in one; a bias chooses experts; dense first blocks; biases; RoPE of neighbouring "
        f"channels; {_EXPERTS.note}",
        shared="mlp.shared_experts",
        shared_fields=("moe_intermediate_size", "moe_num_shared_experts"),
        ffn_field="moe_intermediate_size",
        experts_field="moe_num_experts",
        window=None,
        rope_neighbours=True,
        dense=_between,
        exact=("e_score_correction_bias",),
        variants=(
            Variant({"moe_num_shared_experts": 0}, {"shared": ""}),
            Variant({"use_bias": True}, {"head_bias": True}),
        ),
        renamed=((r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics."),),
    ),
    replace(
        _MIXTRAL,
        model_type="minimax_m2",
        note="a bias chooses experts; partial RoPE; QK-norm over all heads; checkpoints in FP8 are read; "
        f"{_EXPERTS.note}",
        router_bias="mlp.e_score_correction_bias",
        packed="fp8",
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        head_norms_whole=True,
        window=None,
        exact=("e_score_correction_bias",),
    ),
    replace(
        _EXPERTS,
        model_type="gpt_oss",
        note="attention sinks, in the objectives too; biases; a clamped gate; MXFP4 checkpoints are read as what they "
        f"mean; {_EXPERTS.note}",
        router="mlp.router",
        fused=True,
        interleaved=True,
        expert_bias=True,
        linear_up=False,
        packed="mxfp4",
        rope_halves=True,
        experts_field="num_local_experts",
        window="layers",
    ),
    replace(
        _EXPERTS,
        model_type="llama4_text",
        note="a shared expert; scores multiply what experts read, which is in the objectives; dense blocks; in most "
        "layers attention by chunks, RoPE of neighbouring channels, and a norm without a weight behind it; "
        f"{_EXPERTS.note}",
        mlp="feed_forward",
        gate="feed_forward.experts.{}.gate_proj",
        up="feed_forward.experts.{}.up_proj",
        down="feed_forward.experts.{}.down_proj",
        experts="feed_forward.experts",
        router="feed_forward.router",
        shared="feed_forward.shared_expert",
        shared_fields=("intermediate_size",),
        scores_inputs=True,
        fused=True,
        experts_field="num_local_experts",
        dense=_unlisted,
        dense_field="intermediate_size_mlp",
        window="chunks",
        rope_layers="no_rope_layers",
        rope_neighbours=True,
        head_norms_last=True,
        kinds={0: {"query_norm": None, "key_norm": None}},
        kind_field="no_rope_layers",
        variants=(
            Variant({"use_qk_norm": True}, {"query_norm": "self_attn.qk_norm", "key_norm": "self_attn.qk_norm"}),
        ),
    ),
)
