"""The fields of config.json and generation_config.json that say how somebody ran a model, not what it is.

They come with checkpoints that were saved by hand or from memory. An attention, a kernel or a cache by name is right
for one machine and one program: what is made of the checkpoint shall run elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

_FIELDS = frozenset(
    {
        "attn_implementation",
        "experts_implementation",
        "flash_attn_2_enabled",
        "use_flash_attn",
        "use_flash_attention_2",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "use_return_dict",
        "torchscript",
        "gradient_checkpointing",
        "cache_implementation",
        "cache_config",
        "compile_config",
        "device_map",
        "name_or_path",
        "commit_hash",
        "auto_map",  # code of the checkpoint, which is never run
    }
)


def says_how(field: str) -> bool:
    """Whether a field says how a model is run; with an underscore or without, as transformers writes them."""
    return field.lstrip("_").removesuffix("_internal").removesuffix("_autoset") in _FIELDS


def what_it_is(config: Mapping[str, Any]) -> dict[str, Any]:
    """The other fields."""
    return {name: value for name, value in config.items() if not says_how(name)}


def forget_running(config: PretrainedConfig) -> PretrainedConfig:
    """A config that was read, without them, in place."""
    config._attn_implementation = None
    config._experts_implementation = None
    config._output_attentions = False
    for part in (config, getattr(config, "text_config", None)):
        if isinstance(part, PretrainedConfig):
            part.output_hidden_states = False
            part.return_dict = True
    return config
