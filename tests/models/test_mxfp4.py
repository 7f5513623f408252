"""Checkpoints of gpt-oss, whose experts are stored in MXFP4."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from rotoboa.boa.online.attention import NAME
from rotoboa.errors import InputError
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.decoder import Decoder
from rotoboa.models.experts.mxfp4 import dequantized
from rotoboa.models.running import read_config

HIDDEN, FFN, EXPERTS = 32, 64, 4


def _packed(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (EXPERTS, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(118, 125, blocks.shape[:-1], dtype=torch.uint8, generator=generator)


def test_numbers_are_those_of_transformers() -> None:
    """All codes and exponents, to the bit."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16)
    for exponent in (1, 40, 127, 200, 250):
        scales = torch.full((1, 16, 1), exponent, dtype=torch.uint8)
        assert torch.equal(dequantized(blocks, scales), convert_moe_packed_tensors(blocks, scales).mT)
    blocks, scales = _packed(24, 96, 0)
    assert torch.equal(dequantized(blocks, scales), convert_moe_packed_tensors(blocks, scales).mT)


@pytest.fixture
def folder(save_family: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint as the hub has it."""
    made = save_family(tmp_path, "gpt_oss", torch.bfloat16)
    tensors = load_file(made / "model.safetensors")
    for index in range(2):
        stem = f"model.layers.{index}.mlp.experts"
        for seed, (name, rows, columns) in enumerate((("gate_up_proj", 2 * FFN, HIDDEN), ("down_proj", HIDDEN, FFN))):
            del tensors[f"{stem}.{name}"]
            blocks, scales = _packed(rows, columns, 2 * index + seed)
            tensors |= {f"{stem}.{name}_blocks": blocks, f"{stem}.{name}_scales": scales}
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (made / "config.json").write_text(json.dumps(config))
    return made


@torch.no_grad()
def test_a_checkpoint_is_read_as_what_it_means(folder: Path) -> None:
    """The same logits as transformers has of it."""
    checkpoint = Checkpoint(folder)
    assert not hasattr(checkpoint.config, "quantization_config") and checkpoint.dtype == torch.bfloat16
    decoder = Decoder(checkpoint.config, attention=NAME)
    checkpoint.check(decoder.shapes)
    assert not checkpoint.notices(decoder.shapes)
    block, whole = checkpoint.block(1), convert_moe_packed_tensors(*_packed(2 * FFN, HIDDEN, 2)).mT
    assert torch.equal(block["mlp.experts.3.gate_proj.weight"], whole[3, ::2])
    assert torch.equal(block["mlp.experts.3.up_proj.weight"], whole[3, 1::2])
    outer, ids = checkpoint.outer_layers(), torch.randint(3, 100, (2, 24))
    hidden = decoder.embed(outer, ids)
    for index in range(decoder.shape.blocks):
        hidden = decoder.run(decoder.block(index, checkpoint.block(index)), hidden)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True)).float()
    torch.testing.assert_close(decoder.logits(outer)(hidden), model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_other_packings_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is quantized already"):
        read_config(folder)


def test_damaged_files_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    save_file({**tensors, name: tensors[name].float()}, file, metadata={"format": "pt"})
    checkpoint = Checkpoint(folder)
    with pytest.raises(InputError, match=f"tensor {name} is stored as F32"):
        checkpoint.check(Decoder(checkpoint.config, attention=NAME).shapes)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = Checkpoint(folder)
    with pytest.raises(InputError, match=f"has no tensor {name}"):
        checkpoint.check(Decoder(checkpoint.config, attention=NAME).shapes)
