"""What a GGUF file says of sizes and RoPE, by the keys of the gguf package's writer."""

from __future__ import annotations

import math
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from torch import Tensor

from ...errors import InputError
from ..finished import Finished
from .gguf_architectures import Architecture, context, instead, window


def check(run: Finished, row: Architecture) -> None:
    """Check that llama.cpp has the RoPE of a run.

    Raises:
        InputError: it does not.
    """
    kinds = ("default", "linear", "llama3") if row.arch == MODEL_ARCH.LLAMA else ("default", "linear")
    for rope, known in ((_rope(run), kinds), (_local(run), ("default",))):
        kind = rope.get("rope_type", "default")
        if kind not in known:
            name, types = row.arch.name.lower(), " or ".join(known)
            raise InputError(f"GGUF's {name} is written with RoPE of type {types}, and this is {kind}: {instead(run)}.")


def _parameters(run: Finished) -> dict[str, Any]:
    return dict(getattr(run.transformers_config(), "rope_parameters", None) or {})


def _rope(run: Finished) -> dict[str, Any]:
    """Of layers that see all positions."""
    found = _parameters(run)
    return dict(found["full_attention"]) if run.family.rope_by_layer else found


def _local(run: Finished) -> dict[str, Any]:
    """Of layers with a window, where they have their own."""
    return dict(_parameters(run)["sliding_attention"]) if run.family.rope_by_layer else {}


def add_sizes(writer: GGUFWriter, run: Finished, row: Architecture, ffn: int) -> None:
    """Everything that llama.cpp needs to build the decoder."""
    s, config, rope = run.shape, run.transformers_config(), _rope(run)
    writer.add_name(str(run.config.get("_name_or_path") or "model"))
    writer.add_block_count(s.blocks)
    writer.add_context_length(context(run))
    writer.add_embedding_length(s.hidden)
    writer.add_head_count(s.query_heads)
    writer.add_head_count_kv(s.key_heads)
    writer.add_key_length(s.head_dim)
    writer.add_value_length(s.head_dim)
    writer.add_rope_dimension_count(int(s.head_dim * float(rope.get("partial_rotary_factor") or 1.0)))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(s.vocabulary)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if local := _local(run):
        writer.add_rope_freq_base_swa(float(local.get("rope_theta", 10000.0)))
    if row.windows and (size := window(run)) is not None:
        writer.add_sliding_window(size)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    for field, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if getattr(config, field, None) is not None:
            add(float(getattr(config, field)))
    if s.experts:
        writer.add_expert_count(s.experts)
        writer.add_expert_used_count(int(config.num_experts_per_tok))
    if s.shared_ffn:
        writer.add_expert_shared_feed_forward_length(s.shared_ffn)
    if row.arch in (MODEL_ARCH.QWEN2MOE, MODEL_ARCH.QWEN3MOE):
        writer.add_expert_feed_forward_length(ffn)
        ffn = int(config.intermediate_size)  # of blocks without experts, which there are none of
    writer.add_feed_forward_length(ffn)


def rope_factors(run: Finished) -> Tensor | None:
    """What Llama 3.1's RoPE divides each frequency by, (head_dim / 2,) float32; None for other kinds.

    Wavelengths below `original_max_position_embeddings / high_freq_factor` stay, those above `... / low_freq_factor`
    are stretched by `factor`, and between the two the share changes linearly.
    """
    rope = _rope(run)
    if rope.get("rope_type") != "llama3":
        return None
    dim, factor = run.shape.head_dim, float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    share = ((rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float()
