"""Decoders with something else than attention in most blocks: linear recurrences, convolutions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..family import Family
from .mixture_rows import by_steps
from .row_parts import Merged, Variant

Sizes = dict[str, tuple[int, int]]
_NO_ATTENTION: dict[str, Any] = {"query": "", "key": "", "value": "", "query_norm": None, "key_norm": None}


def _delta_net(config: Any) -> Sizes:
    """Of a gated delta net, whose values may have more heads than its keys."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    return {
        "linear_attn.in_proj_qkv": (2 * keys + values, config.hidden_size),
        "linear_attn.in_proj_z": (values, config.hidden_size),
        "linear_attn.out_proj": (config.hidden_size, values),
    }


def _merged_delta_net(config: Any) -> Sizes:
    """The same with one layer for all that is mixed."""
    (mixed, hidden), (gate, _), output = _delta_net(config).values()
    return {"linear_attn.in_proj_qkvz": (mixed + gate, hidden), "linear_attn.out_proj": output}


def _short_convolution(config: Any) -> Sizes:
    """Of LFM2, whose config has its MLP's size before it is adjusted."""
    ffn, hidden = config.intermediate_size, config.hidden_size
    if config.block_auto_adjust_ff_dim:
        ffn, unit = int(2 * ffn / 3), config.block_multiple_of
        if config.block_ffn_dim_multiplier is not None:
            ffn = -(-int(config.block_ffn_dim_multiplier * ffn) // unit) * unit
    return {"conv.in_proj": (3 * hidden, hidden), "conv.out_proj": (hidden, hidden), "feed_forward.w2": (hidden, ffn)}


def _mamba(config: Any) -> Sizes:
    """Of Mamba 2, whose steps in time are put out by the layer that puts out all else."""
    inner, hidden = int(config.mamba_expand * config.hidden_size), config.hidden_size
    states = 2 * config.mamba_n_groups * config.mamba_d_state
    return {
        "mamba.in_proj.mixed": (2 * inner + states, hidden),
        "mamba.in_proj.time": (config.mamba_n_heads, hidden),
        "mamba.out_proj": (hidden, inner),
    }


def _linear(*mixed: str, kept: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The kind of block that Qwen's have in place of attention."""
    fields = {"attention": "linear_attn", "output": "linear_attn.out_proj", "mixed": mixed, "kept": kept}
    return {"linear_attention": {**_NO_ATTENTION, **fields, "attention_gate": "", "merged": ()}}


_NOTE = (
    "gated delta nets in most blocks, which remember in full precision, as do the layers that decide how long; "
    "attention with a gate, in the objectives too; QK-norm; partial RoPE"
)
_QWEN = Family(
    "qwen3_5_text",
    note=_NOTE,
    norm_offset=1.0,
    query="self_attn.q_proj.query",
    attention_gate="self_attn.q_proj.gate",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    merged=(Merged("self_attn.q_proj", {"query": "query_width", "gate": "query_width"}, groups="query_heads"),),
    kinds=_linear(
        *("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
        kept=("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
    ),
    measured=_delta_net,
    renamed=((r"^model\.language_model\.", "model."),),
)
_MIXTURE: dict[str, Any] = {
    "gate": "mlp.experts.{}.gate_proj",
    "up": "mlp.experts.{}.up_proj",
    "down": "mlp.experts.{}.down_proj",
    "experts": "mlp.experts",
    "router": "mlp.gate",
    "shared": "mlp.shared_expert",
    "shared_gate": "mlp.shared_expert_gate",
    "shared_fields": ("shared_expert_intermediate_size",),
    "ffn_field": "moe_intermediate_size",
    "experts_field": "num_experts",
}


def _granite(ffn: str) -> dict[str, Any]:
    """Merged layers of Granite's two kinds of block, whose MLP that all tokens go to is `ffn` wide."""
    mlp = Merged("shared_mlp.input_linear", {"gate": ffn, "up": ffn})
    mamba = {
        **_NO_ATTENTION,
        "attention": "mamba",
        "mixed": ("mamba.in_proj.mixed",),
        "kept": ("mamba.in_proj.time",),
        "output": "mamba.out_proj",
        "merged": (mlp, Merged("mamba.in_proj", {"mixed": "", "time": ""})),
    }
    return {"merged": (mlp,), "kinds": {"linear_attention": mamba}}


_GRANITE_EXPERTS: dict[str, Any] = {
    **_granite("shared_ffn"),
    "mlp": "block_sparse_moe",
    "gate": "block_sparse_moe.experts.{}.gate_proj",
    "up": "block_sparse_moe.experts.{}.up_proj",
    "down": "block_sparse_moe.experts.{}.down_proj",
    "experts": "block_sparse_moe.experts",
    "router": "block_sparse_moe.router",
    "fused": True,
    "shared": "shared_mlp",
    "shared_parts": ("input_linear.gate", "input_linear.up", "output_linear"),
    "shared_fields": ("shared_intermediate_size",),
    "ffn_field": "intermediate_size",
    "experts_field": "num_local_experts",
    "renamed": (
        (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
        (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
        (r"\.block_sparse_moe\.router\.layer\.weight$", ".block_sparse_moe.router.weight"),
    ),
}
ROWS = (
    _QWEN,
    replace(
        _QWEN,
        model_type="qwen3_next",
        note=f"{_NOTE}; experts as of qwen2_moe",
        kinds=_linear("linear_attn.in_proj_qkvz", kept=("linear_attn.in_proj_ba",)),
        measured=_merged_delta_net,
        renamed=(),
        dense=by_steps,
        **_MIXTURE,
    ),
    Family(
        "granitemoehybrid",
        note="Mamba 2 in most blocks, whose state and steps in time are in full precision; factors of embedding, "
        "branches, attention and logits stay where they are; mostly without RoPE; experts beside a shared one in some",
        rotary=None,
        mlp="shared_mlp",
        gate="shared_mlp.input_linear.gate",
        up="shared_mlp.input_linear.up",
        down="shared_mlp.output_linear",
        **_granite("ffn"),
        measured=_mamba,
        ffn_field="shared_intermediate_size",
        embedding_factor="embedding_multiplier",
        branch_factor="residual_multiplier",
        logits_divisor="logits_scaling",
        variants=(
            Variant({"position_embedding_type": "rope"}, {"rotary": "model.rotary_emb"}),
            Variant({"num_local_experts": True}, _GRANITE_EXPERTS),
        ),
    ),
    replace(_QWEN, model_type="qwen3_5_moe_text", note=f"{_NOTE}; experts as of qwen2_moe", **_MIXTURE),
    Family(
        "lfm2",
        note="short convolutions in most blocks; QK-norm",
        final_norm="model.embedding_norm",
        attention_norm="operator_norm",
        output="self_attn.out_proj",
        query_norm="self_attn.q_layernorm",
        key_norm="self_attn.k_layernorm",
        mlp_norm="ffn_norm",
        mlp="feed_forward",
        gate="feed_forward.w1",
        up="feed_forward.w3",
        down="feed_forward.w2",
        kinds={
            "conv": {
                **_NO_ATTENTION,
                "attention": "conv",
                "mixed": ("conv.in_proj",),
                "output": "conv.out_proj",
            }
        },
        measured=_short_convolution,
    ),
)
