"""Where each architecture keeps its parts: a table of data, one row a `model_type` of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import InputError
from .family import SITES, Family, Merged
from .seeing.seeing_rows import rows_that_see

__all__ = ["FAMILIES", "SITES", "Family", "Merged", "check_type", "family_for", "family_of"]

_CAUSAL: Mapping[str, tuple[Any, ...] | str] = {"use_bidirectional_attention": (False, None)}
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
    legal=_CAUSAL,
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
_ROWS = (
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
        "opt",
        note="LayerNorm becomes RMSNorm: its mean and bias are folded, exactly; post-norm OPT-350M is refused",
        embedding="model.decoder.embed_tokens",
        layers="model.decoder.layers",
        rotary=None,
        final_norm="model.decoder.final_layer_norm",
        attention_norm="self_attn_layer_norm",
        output="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        mlp="",
        gate="",
        up="fc1",
        down="fc2",
        activation="activation_fn",
        layer_norm=True,
        positions="model.decoder.embed_positions",
        position_offset=2,
        ffn_field="ffn_dim",
        legal={
            "word_embed_proj_dim": "hidden_size",
            "do_layer_norm_before": (True,),
            "enable_bias": (True,),
            "layer_norm_elementwise_affine": (True,),
            "_remove_final_layer_norm": (False,),
        },
    ),
    Family(
        "gemma",
        norm_offset=1.0,
        scaled_embedding=True,
        bos=True,
        legal=_CAUSAL,
        note="no norms after attention and MLP, which its successors have; windows of text begin with BOS",
    ),
    _GEMMA2,
    replace(
        _GEMMA2,
        model_type="gemma3_text",
        note="norms after attention and MLP, QK-norm; windows of text begin with BOS; windows, RoPE by layer",
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        rope_by_layer=True,
        # Its attention ignores the field, so a model that sets it would not be the one that was trained.
        legal={**_CAUSAL, "attn_logit_softcapping": (None,)},
    ),
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
        legal={"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    ),
    replace(
        _EXPERTS,
        model_type="olmoe",
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        head_norms_whole=True,
        experts_field="num_experts",
        legal={"clip_qkv": (None,)},
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
    Family(
        "starcoder2",
        note="LayerNorm, folded as OPT's; no gate; sliding window",
        gate="",
        up="mlp.c_fc",
        down="mlp.c_proj",
        activation="mlp.act",
        layer_norm=True,
        window="all",
        legal={"use_bias": (True,)},  # the biases of its norms go into those of their readers
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
    Family("ernie4_5", rope_neighbours=True, note="RoPE of neighbouring channels; biases"),
    Family(
        "hunyuan_v1_dense",
        note="QK-norm after RoPE",
        query_norm="self_attn.query_layernorm",
        key_norm="self_attn.key_layernorm",
        head_norms_last=True,
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
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ROWS}
FAMILIES |= rows_that_see(FAMILIES)

# What is near to a supported architecture, and why it is not one.
_REASONS = {
    "llama4": "its router scales what its experts read, and attention is by chunks",
    "llama4_text": "its router scales what its experts read, and attention is by chunks",
    "gpt_oss": "its attention has sinks",
    "qwen2_moe": "its experts are joined by a shared one",
    "qwen3_next": "its attention is linear in most layers",
    "deepseek_v2": "its attention compresses keys and values",
    "deepseek_v3": "its attention compresses keys and values",
}


def check_type(model_type: str, source: str) -> None:
    """Check that there is a row of `model_type`, or a decoder of transformers; `source` names the model in the error.

    Raises:
        InputError: there is neither.
    """
    from .generic.generic_family import is_causal_type  # a recipe's fields are read without torch

    if model_type in _REASONS or not is_causal_type(model_type):
        family_of(model_type, source)


def family_of(model_type: str, source: str) -> Family:
    """The row of `model_type`; `source` names the model in the error.

    Raises:
        InputError: no row has this type.
    """
    if model_type not in FAMILIES:
        reason = f" ({_REASONS[model_type]})" if model_type in _REASONS else ""
        raise InputError(
            f"{source} is a '{model_type}' model, which is not supported{reason}; supported architectures: "
            f"{', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]


def family_for(config: Any, source: str) -> Family:
    """The row of a transformers config with what the config adds to it; `source` names the model in errors.

    Where there is no row it is found by running the model: see `generic_family`.

    Raises:
        InputError: the model is not supported, or the config asks for a variant that is not supported.
    """
    from .generic.generic_family import generic_family, is_causal_type

    if config.model_type not in FAMILIES and config.model_type not in _REASONS and is_causal_type(config.model_type):
        return generic_family(config, source)
    family = family_of(config.model_type, source)
    config = family.text(config)
    if family.sight and config.model_type not in family.sight.texts:
        raise InputError(
            f"{source} is a '{family.model_type}' model whose decoder is a '{config.model_type}', and "
            f"{' or '.join(family.sight.texts)} is supported: choose another model."
        )
    for field, legal in (family.legal or {}).items():
        value = getattr(config, field, None)
        values = (getattr(config, legal, None),) if isinstance(legal, str) else legal
        if value not in values:
            wanted = f"{legal} ({values[0]})" if isinstance(legal, str) else str(values[0])
            raise InputError(
                f"{source} has {field} {value} in its config.json, and '{family.model_type}' models are supported "
                f"with {wanted} alone: choose another model of the family."
            )
    count = int(getattr(config, family.experts_field)) if family.experts_field else 0
    return replace(family, expert_count=count)
