"""Small models of architectures that have no row, with random weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .small_families import SIZES, save_tokenizer

# By model_type: fields beside the common sizes.
GENERIC: dict[str, dict[str, Any]] = {
    "helium": {"head_dim": 8},
    "cohere": {"logit_scale": 0.25},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4, "n_positions": 256, "n_inner": 48},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 256},
    "gpt_bigcode": {"n_positions": 256, "n_inner": 48},
    "nemotron": {"head_dim": 8},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},  # on disk its experts are in one tensor
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
            else:
                parameter.copy_(noise * (1.0 if "embed" in key or "wte" in key else 1.3 / parameter.shape[-1] ** 0.5))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder
