"""What tests of whole runs read of a model folder, and the ids they run it on."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def ids() -> Tensor:
    return torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(1))


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))
