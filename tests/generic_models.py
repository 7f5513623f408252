"""Small models of architectures that have no row, with random weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .small_families import SIZES, save_tokenizer

# By model_type: fields beside the common sizes.
GENERIC: dict[str, dict[str, Any]] = {
    "gpt_neox": {"rotary_pct": 0.25},
    "phi": {"partial_rotary_factor": 0.5},
    "bloom": {"n_head": 4, "n_layer": 2},
    "cohere2": {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"], "logit_scale": 0.25},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "gpt_bigcode": {"n_positions": 256, "n_inner": 48},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_key_value_heads": None},
    "nemotron": {"head_dim": 8},
    "mamba": {"state_size": 4, "time_step_rank": 16},
}


def generic_config(name: str, **changes: Any) -> Any:
    """That of a small model of this type."""
    fields = SIZES | {"pad_token_id": None} | GENERIC.get(name, {}) | changes
    return AutoConfig.for_model(name, **{k: v for k, v in fields.items() if v is not None or k == "pad_token_id"})


def save_generic(folder: Path, name: str) -> Path:
    """A checkpoint of the real class, every tensor random, with a tokenizer of characters."""
    model: Any = AutoModelForCausalLM.from_config(generic_config(name))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            elif parameter.ndim == 2:
                parameter.copy_(noise * (1.0 if "embed" in key or "wte" in key else 1.3 / parameter.shape[-1] ** 0.5))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder
