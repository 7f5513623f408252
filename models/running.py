"""The fields of config.json and generation_config.json that say how somebody ran a model, not what it is.

They come with checkpoints that were saved by hand or from memory. An attention, a kernel or a cache by name is right
for one machine and one program: what is made of the checkpoint shall run elsewhere. `read_config` leaves them out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from ..errors import InputError
from .families import FAMILIES, check_type
from .stored.block_fp8 import is_readable

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


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a checkpoint folder.

    Raises:
        InputError: it cannot be read, or is that of a quantized or unsupported model.
    """
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it holds no JSON object")
        check_type(str(raw.get("model_type")), str(folder))
        if packed := raw.get("quantization_config"):
            row = FAMILIES.get(str(raw.get("model_type")))
            if row is None or not is_readable(packed, row.packed):
                raise InputError(f"{folder} is quantized already: give the full-precision checkpoint.")
        config = forget_running(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        if packed:
            del config.quantization_config  # what is made of it is read as numbers, and is stored otherwise
        if not hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = False  # which transformers takes it for
        return config
    except (ValueError, KeyError, TypeError, ArithmeticError, OSError, StrictDataclassError) as error:
        what = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"{folder / 'config.json'} cannot be read ({what}): download it again.") from error


def floats_read(value: Any) -> Any:
    """What JSON holds, with the floats that it has no numbers for (infinity), which transformers writes as words."""
    if isinstance(value, dict):
        word = value.get("__float__") if len(value) == 1 else None
        return float(word) if isinstance(word, str) else {name: floats_read(part) for name, part in value.items()}
    return [floats_read(part) for part in value] if isinstance(value, list) else value
