"""Checkpoints whose weights are FP8 with scales of blocks: read as what they mean."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rotoboa.errors import InputError
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.decoder import Decoder
from rotoboa.models.stored.block_fp8 import BLOCK, dequantized

CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def _quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """In E4M3, each block with a scale of its own."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    scale, found = torch.empty(rows, columns), torch.empty_like(weight)
    for i in range(rows):
        for j in range(columns):
            part = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scale[i, j] = weight[part].abs().max() / 448
            found[part] = weight[part] / scale[i, j]
    return found.to(torch.float8_e4m3fn), scale


def test_dequantized_is_each_number_times_the_scale_of_its_block() -> None:
    weight, scale = _quantized(torch.randn(300, 140, generator=torch.Generator().manual_seed(0)))
    found = dequantized(weight, scale)
    assert found.dtype == torch.float32 and scale.shape == (3, 2)
    for i, j in ((0, 0), (127, 127), (128, 127), (299, 139), (255, 128), (256, 0)):
        assert float(found[i, j]) == float(weight[i, j].float() * scale[i // BLOCK, j // BLOCK])


@pytest.fixture(params=["deepseek_v3", "minimax_m2"])
def folder(save_family: Callable[..., Path], change_tensors: Callable[..., Path], tmp_path: Path, request: Any) -> Path:
    """A small model as the hub has it: MiniMax's with the router in float32."""
    folder = save_family(tmp_path, request.param, torch.bfloat16)

    def pack(tensors: dict[str, Tensor]) -> None:
        assert ("model.layers.1.block_sparse_moe.experts.3.w2.weight" in tensors) == (request.param == "minimax_m2")
        for name in [name for name in tensors if name.endswith("block_sparse_moe.gate.weight")]:
            tensors[name] = tensors[name].float()
        for name in [name for name in tensors if re.search(r"(_proj|\.w[123])\.weight$|_proj_with_mqa.weight", name)]:
            weight, scale = _quantized(tensors[name].float())
            tensors |= {name: weight, f"{name}_scale_inv": scale}

    change_tensors(folder, pack)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": CONFIG}))
    return folder


def test_a_checkpoint_in_fp8_is_read(folder: Path, save_family: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint(folder)
    plain = Checkpoint(save_family(tmp_path / "plain", checkpoint.family.model_type, torch.bfloat16))
    decoder = Decoder(checkpoint.config)
    checkpoint.check(decoder.shapes)
    assert not checkpoint.notices(decoder.shapes) and not hasattr(checkpoint.config, "quantization_config")
    assert checkpoint.dtype == torch.bfloat16
    for index in range(2):
        found, exact = checkpoint.block(index), plain.block(index)
        assert found.keys() == exact.keys()
        for name, tensor in found.items():
            wide = exact[name].float()
            packed = "_proj" in name and name.endswith("weight")
            wider = packed or (name == "mlp.gate.weight" and checkpoint.family.model_type == "minimax_m2")
            assert tensor.dtype == (torch.float32 if wider else exact[name].dtype)
            # Of 3 bits behind the point, and the smallest numbers of a block.
            off = (tensor.float() - wide).abs() - wide.abs() / 16
            assert (
                float(off.max()) <= float(wide.abs().max()) / 448 / 2 if packed else torch.equal(tensor.float(), wide)
            )
        decoder.run(decoder.block(index, found), torch.randn(1, 5, 32))


def test_scales_of_another_shape_are_refused(folder: Path, change_tensors: Callable[..., Path]) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({f"{name}_scale_inv": torch.ones(2, 1)}))
    checkpoint = Checkpoint(folder)
    with pytest.raises(InputError, match=r"o_proj.weight has scales of shape \(2, 1\), and blocks of 128 x 128 ask"):
        checkpoint.check(Decoder(checkpoint.config).shapes)


@pytest.mark.parametrize("changes", [{"weight_block_size": [64, 64]}, {"quant_method": "gptq"}])
def test_other_formats_are_refused(folder: Path, changes: dict[str, object]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {**CONFIG, **changes}}))
    with pytest.raises(InputError, match="is quantized already"):
        Checkpoint(folder)
