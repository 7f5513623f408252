"""The config.json of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from ...errors import InputError
from ..families import FAMILIES, check_type
from ..running import forget_running
from . import block_fp8


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
            if row is None or not block_fp8.is_readable(packed, row.packed):
                raise InputError(f"{folder} is quantized already: give the full-precision checkpoint.")
        config = forget_running(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        if packed:
            del config.quantization_config  # what is made of it is read as numbers, and is stored otherwise
        return config
    except (ValueError, KeyError, TypeError, ArithmeticError, OSError, StrictDataclassError) as error:
        what = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"{folder / 'config.json'} cannot be read ({what}): download it again.") from error
