"""A small model of every architecture, with random weights."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from rotoboa.models.families import FAMILIES as ROWS
from rotoboa.models.seeing.whole_model import attention_in, auto_class

from .small_hybrids import SMALL_HYBRIDS
from .small_mixtures import SMALL_MIXTURES

# By name of the variant: model_type and what differs from the common sizes. Windows are shorter than any test's text.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 9, "head_dim": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "phi3": {"sliding_window": 9, "pad_token_id": 0},
    "phi3-longrope": {
        "model_type": "phi3",
        "pad_token_id": 0,
        "head_dim": 8,
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2],
            "long_factor": [1.5, 2.0, 4.0],
            "original_max_position_embeddings": 16,
            "factor": 16.0,
        },
    },
    "opt": {
        "ffn_dim": 48,
        "num_key_value_heads": 4,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
        "tie_word_embeddings": True,
        "pad_token_id": 1,
    },
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 9,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 9,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
        },
        "tie_word_embeddings": True,
    },
    **SMALL_MIXTURES,
    **SMALL_HYBRIDS,
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "seed_oss": {"head_dim": 16, "attention_bias": True, "attention_out_bias": True, "pad_token_id": None},
    "ministral3": {
        "head_dim": 16,
        "sliding_window": 9,
        "pad_token_id": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "smollm3": {
        "no_rope_layers": [1, 0],
        "pad_token_id": None,
        "use_sliding_window": True,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "starcoder2": {"use_bias": False, "sliding_window": 9, "tie_word_embeddings": True},
    "olmo2": {"pad_token_id": None},
    "olmo3": {
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
        "pad_token_id": None,
    },
    "exaone4": {
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
        "pad_token_id": None,
        "tie_word_embeddings": True,
    },
    "ernie4_5": {"head_dim": 16, "use_bias": True, "pad_token_id": None, "tie_word_embeddings": True},
    "hunyuan_v1_dense": {"head_dim": 16, "pad_token_id": None},
    "glm4": {"head_dim": 16, "pad_token_id": None},
    "bloom": {"intermediate_size": 128, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "falcon": {"num_key_value_heads": 1, "num_kv_heads": 1, "tie_word_embeddings": True},
    "falcon-40b": {
        "model_type": "falcon",
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "bias": True,
        "tie_word_embeddings": True,
    },
    "falcon-rw": {
        "model_type": "falcon",
        "num_key_value_heads": 4,
        "multi_query": False,
        "parallel_attn": False,
        "alibi": True,
        "bias": True,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {"num_key_value_heads": 4, "rotary_pct": 0.5},
    "gpt_neox-serial": {"model_type": "gpt_neox", "num_key_value_heads": 4, "use_parallel_residual": False},
    "phi": {"partial_rotary_factor": 0.5},
    "cohere2": {
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
        "logit_scale": 2.0,
        "pad_token_id": None,
        "tie_word_embeddings": True,
    },
    "stablelm": {"partial_rotary_factor": 0.5},
    "stablelm-parallel": {
        "model_type": "stablelm",
        "partial_rotary_factor": 0.5,
        "use_qkv_bias": True,
        "use_parallel_residual": True,
    },
}
# Models that see, likewise: what differs in `text_config`, and the rest.
_TOWER = {"hidden_size": 16, "intermediate_size": 24}
_OF_QWEN = {"depth": 2, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4, **_TOWER}
_OF_OTHERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4, **_TOWER}
IMAGE = 99  # a token's number
SEEING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {"model_type": "gemma3_text", **FAMILIES["gemma3_text"]},
        {
            "vision_config": {"model_type": "siglip_vision_model", **_OF_OTHERS},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
        },
    ),
    "mistral3": (
        {"model_type": "mistral", **FAMILIES["mistral"]},
        {
            "vision_config": {"model_type": "pixtral", "head_dim": 8, **_OF_OTHERS},
            "image_token_index": IMAGE,
            "multimodal_projector_bias": True,
        },
    ),
    "mistral3-ministral3": (
        {"model_type": "ministral3", **FAMILIES["ministral3"]},
        {"vision_config": {"model_type": "pixtral", "head_dim": 8, **_OF_OTHERS}, "image_token_index": IMAGE},
    ),
    "qwen2_5_vl": (
        {**FAMILIES["qwen2"], "pad_token_id": 0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        {
            "vision_config": {"window_size": 16, "fullatt_block_indexes": [1], **_OF_QWEN},
            "image_token_id": IMAGE,
        },
    ),
    "qwen2_vl": (
        {**FAMILIES["qwen2"], "pad_token_id": 0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        {
            "vision_config": {"depth": 2, "num_heads": 2, "embed_dim": 16, "hidden_size": 32, "patch_size": 4},
            "image_token_id": IMAGE,
        },
    ),
    "qwen3_vl": (
        {
            "head_dim": 16,
            "pad_token_id": 0,
            "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
        },
        {
            "vision_config": {"num_position_embeddings": 16, "deepstack_visual_indexes": [0], **_OF_QWEN},
            "image_token_id": IMAGE,
        },
    ),
}
SEEING["qwen3_vl_moe"] = (
    {**SEEING["qwen3_vl"][0], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    SEEING["qwen3_vl"][1],
)
SEEING |= {
    name: (
        {**FAMILIES[f"{name}_text"], "pad_token_id": 0},
        {"vision_config": {"num_position_embeddings": 16, **_OF_QWEN}, "image_token_id": IMAGE},
    )
    for name in ("qwen3_5", "qwen3_5_moe")
}
SEEING["llama4"] = (
    FAMILIES["llama4_text"],
    {
        "vision_config": {
            **_OF_OTHERS,
            "intermediate_size": 64,
            **dict.fromkeys(("projector_input_dim", "projector_output_dim", "vision_output_dim"), 24),
        },
        "image_token_index": IMAGE,
    },
)
MIXTURES = [name for name, fields in FAMILIES.items() if any("experts" in key and fields[key] for key in fields)]


SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""Of a small model."""


def family_config(name: str, **changes: Any) -> Any:
    """`changes` of a model that sees are those of its decoder."""
    if name in SEEING:
        text, rest = SEEING[name]
        text = SIZES | text | changes
        tied = text.pop("tie_word_embeddings", False)
        return AutoConfig.for_model(
            **{"model_type": name.partition("-")[0], "tie_word_embeddings": tied, "text_config": text, **rest}
        )
    return AutoConfig.for_model(
        **({"model_type": name, "tie_word_embeddings": False} | SIZES | FAMILIES[name] | changes)
    )


def make_family(name: str, attention: str = "eager", **changes: Any) -> Any:
    """The real transformers class, every tensor random: sharp attention, norms that are no 1, biases that are no 0."""
    config = family_config(name, **changes)
    config._experts_implementation = "eager"  # grouped products have no float64
    generator, row = torch.Generator().manual_seed(7), ROWS[config.model_type]
    model: Any = auto_class(row).from_config(config, attn_implementation=attention_in(row, attention))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in key and key.endswith("weight"):
                start = 1.0 - row.norm_offset * ("language_model" in key or row.sight is None)
                parameter.copy_(start + 0.3 * noise)
            elif key.endswith(row.exact):  # a bias by which experts are chosen, to their scores of 0 to 1
                parameter.copy_(0.1 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            elif "embed" in key:
                parameter.copy_(noise + 0.3)  # with a mean over channels, which only LayerNorm takes out
            else:
                parameter.copy_(noise * 1.3 / parameter.shape[-1] ** 0.5)
        for key, buffer in model.named_buffers():
            if key.endswith(row.exact):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


def save_as_family(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """`make_family` with a tokenizer of characters."""
    make_family(name, **changes).to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """One of characters."""
    characters = ["<s>", "</s>", "<unk>", *(chr(i) for i in range(32, 127)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.save_pretrained(folder)
