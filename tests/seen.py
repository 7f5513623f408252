"""What models that see are given in tests: text with an image in it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from .small_families import IMAGE

LENGTH, AT = 24, slice(6, 10)  # of the text, and where the image's four tokens are


def inputs(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What a small model of the family takes: token ids with an image among them, and the image."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 90, (1, LENGTH), generator=generator)
    ids[:, AT] = IMAGE
    kinds = (ids == IMAGE).long()
    if name.startswith("qwen"):
        patches = torch.randn(16, 96, generator=generator).to(dtype)  # 4 x 4, of 2 frames of 3 colours of 4 x 4
        grid: dict[str, Any] = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": kinds}
        return {"input_ids": ids, "pixel_values": patches, **grid}
    pixels = torch.randn(1, 3, 16, 16, generator=generator).to(dtype)
    sizes = {"image_sizes": torch.tensor([[16, 16]])}
    own = {"gemma3": {"token_type_ids": kinds}, "llama4": {}}.get(name, sizes)
    return {"input_ids": ids, "pixel_values": pixels, **own}


@pytest.fixture(autouse=True)
def llama4_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Llama 4's class of transformers 5.24 run: it asks for what the output of its decoder does not have."""
    monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)
