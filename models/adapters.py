"""Adapters (LoRA and its like, as PEFT saves them): they are no part of what is read here, and are refused."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InputError

CONFIG = "adapter_config.json"
MERGE = "merge it first (peft's `merge_and_unload`, then `save_pretrained`)"
TENSOR = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module)\.")
"""What is in the names of tensors of a model that an adapter is attached to."""


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder whose model transformers would load with an adapter, which would be left out here.

    Raises:
        InputError: there is an adapter in it.
    """
    if not (folder / CONFIG).is_file():
        return
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is an adapter, without the model that it was made for: {MERGE}.")
    raise InputError(both(str(folder)))


def both(where: str) -> str:
    """The sentence on an adapter beside a model, in a folder or on the hub."""
    return f"{where} holds an adapter ({CONFIG}) beside the model: {MERGE}, or remove {CONFIG} where that is done."
