"""Decoders with LayerNorm, whose mean and bias are folded where R1 is merged."""

from __future__ import annotations

from dataclasses import replace

from ..family import Family
from .row_parts import Merged, Variant

_BY_HEAD = {"query": "query_width", "key": "key_width", "value": "key_width"}
_BLOOM = Family(
    "",
    embedding="transformer.word_embeddings",
    layers="transformer.h",
    rotary=None,
    final_norm="transformer.ln_f",
    attention="self_attention",
    query="self_attention.query_key_value.query",
    key="self_attention.query_key_value.key",
    value="self_attention.query_key_value.value",
    output="self_attention.dense",
    gate="",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    layer_norm=True,
    own_attention="eager",
    merged=(Merged("self_attention.query_key_value", _BY_HEAD, groups="key_heads"),),
)
ROWS = (
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
            "layer_norm_elementwise_affine": (True,),
            "_remove_final_layer_norm": (False,),
        },
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
    ),
    Family(
        "gpt_neox",
        note="Pythia: attention and MLP side by side or one after the other; q, k, v merged by head; partial RoPE",
        embedding="gpt_neox.embed_in",
        layers="gpt_neox.layers",
        rotary="gpt_neox.rotary_emb",
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        query="attention.query_key_value.query",
        key="attention.query_key_value.key",
        value="attention.query_key_value.value",
        output="attention.dense",
        gate="",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        activation="mlp.act",
        layer_norm=True,
        parallel=True,
        merged=(Merged("attention.query_key_value", _BY_HEAD, groups="key_heads"),),
        variants=(Variant({"use_parallel_residual": False}, {"parallel": False}),),
        renamed=((r"^embed_out\.", "lm_head."),),
        ignored=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
    ),
    Family(
        "phi",
        note="1 to 2: attention and MLP side by side behind one norm; partial RoPE; the output layer has a bias",
        final_norm="model.final_layernorm",
        output="self_attn.dense",
        mlp_norm="input_layernorm",
        gate="",
        up="mlp.fc1",
        down="mlp.fc2",
        activation="mlp.activation_fn",
        layer_norm=True,
        parallel=True,
        head_bias=True,
        legal={"qk_layernorm": (False,)},
        otherwise_generic=True,
    ),
    Family(
        "cohere2",
        note="attention and MLP side by side behind one LayerNorm without bias; RoPE in layers with windows alone, of "
        "neighbouring channels; scaled logits",
        mlp_norm="input_layernorm",
        layer_norm=True,
        parallel=True,
        window="layers",
        rope_layers="layer_types",
        rope_neighbours=True,
        logits_factor="logit_scale",
        variants=(Variant({"sliding_window": None}, {"rope_layers": "none"}),),
    ),
    Family(
        "stablelm",
        note="LayerNorm, folded into biases that its layers get; partial RoPE; side by side or one after the other",
        layer_norm=True,
        variants=(Variant({"use_parallel_residual": True}, {"parallel": True, "mlp_norm": "input_layernorm"}),),
        legal={"qk_layernorm": (False,)},
        otherwise_generic=True,
    ),
    replace(
        _BLOOM,
        model_type="bloom",
        note="ALiBi, in the objectives too; the norm behind the embedding goes into its rows, which the output layer "
        "then has not; q, k, v merged by head",
        embedding_norm="transformer.word_embeddings_layernorm",
        embedding_epsilon="layer_norm_epsilon",
        activation="mlp.gelu_impl",
        alibi="logits",
        legal={"apply_residual_connection_post_layernorm": (False,)},
    ),
    replace(
        _BLOOM,
        model_type="falcon",
        note="7B and 40B: attention and MLP side by side behind one norm or two; q, k, v merged by key head; RW: ALiBi",
        rotary="transformer.rotary_emb",
        own_attention="sdpa",  # with transformers 5.24 its "eager" adds ALiBi twice
        mlp_norm="input_layernorm",
        activation="mlp.act",
        parallel=True,
        ffn_field="ffn_hidden_size",
        key_heads="num_kv_heads",
        variants=(
            Variant({"new_decoder_architecture": False, "multi_query": True}, {"key_heads": 1}),
            Variant(
                {"new_decoder_architecture": False, "parallel_attn": False},
                {"parallel": False, "mlp_norm": "post_attention_layernorm"},
            ),
            *(
                Variant(
                    {"new_decoder_architecture": True, "num_ln_in_parallel_attn": norms},
                    {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"},
                )
                for norms in (2, None)
            ),
            Variant({"alibi": True}, {"rotary": None, "alibi": "products"}),
        ),
    ),
)
