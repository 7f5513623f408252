"""GPTQ against a reader written from the format's description, bit for bit, and our own reader against bad input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rotoboa.boa.solver.rounding import Quantized
from rotoboa.errors import InputError
from rotoboa.export.finished import Finished
from rotoboa.export.formats import gptq
from rotoboa.export.formats.gptq import V1, V2, from_gptq, to_gptq
from rotoboa.pipeline.verifying import run_logits

Opened = Callable[..., Finished]


def unpack_column(words: list[int], bits: int) -> list[int]:
    """One column of packed words, as the format describes it: 32 / bits values a word, the first in the lowest bits.

    3 bits: three words hold 32 values. Ten lie in the first; the 11th has two bits there and its high bit in the
    second, which goes on with ten more; the 22nd has one bit there and two in the third, which ends with ten.
    """
    words = [word & 0xFFFFFFFF for word in words]
    if bits != 3:
        return [word >> shift & (2**bits - 1) for word in words for shift in range(0, 32, bits)]
    values = []
    for a, b, c in zip(words[::3], words[1::3], words[2::3], strict=True):
        values += [a >> 3 * i & 7 for i in range(10)]
        values += [a >> 30 & 3 | (b & 1) << 2]
        values += [b >> 3 * i + 1 & 7 for i in range(10)]
        values += [b >> 31 & 1 | (c & 3) << 1]
        values += [c >> 3 * i + 2 & 7 for i in range(10)]
    return values


def read_layer(tensors: dict[str, Tensor], bits: int, version: str) -> tuple[list[list[int]], Tensor]:
    """Integers and weight (in, out) of one layer; every number on its own, in float64."""
    columns = [unpack_column(column, bits) for column in tensors["qweight"].T.tolist()]
    zeros = [unpack_column(row, bits) for row in tensors["qzeros"].tolist()]
    scales = tensors["scales"].double().tolist()
    groups = tensors["g_idx"].tolist()
    integers = [list(row) for row in zip(*columns, strict=True)]
    more = 1 if version == "gptq" else 0
    weight = [
        [scales[groups[i]][j] * (q - (zeros[groups[i]][j] + more)) for j, q in enumerate(row)]
        for i, row in enumerate(integers)
    ]
    return integers, torch.tensor(weight, dtype=torch.float64)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("version", [V2, V1])
def test_round_trip_through_the_description(bits: int, groups: int, version: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    integers = torch.randint(2**bits, (32, 64), generator=generator).to(torch.uint8)
    zero = torch.randint(2**bits, (32, groups), generator=generator).float()
    if version == V1:
        zero.fill_(2 ** (bits - 1))
    result = Quantized(integers, torch.rand(32, groups, generator=generator).half().float(), zero)
    tensors = to_gptq(result, bits, version)
    assert tensors["qweight"].shape == (64 * bits // 32, 32) and tensors["qweight"].dtype == torch.int32
    assert tensors["qzeros"].shape == (groups, 32 * bits // 32) and tensors["qzeros"].dtype == torch.int32
    assert tensors["scales"].shape == (groups, 32) and tensors["scales"].dtype == torch.float16
    assert tensors["g_idx"].shape == (64,) and tensors["g_idx"].dtype == torch.int32
    found, weight = read_layer(tensors, bits, version)
    assert found == integers.T.tolist()
    assert torch.equal(weight.T, result.dequantize().double())
    again = from_gptq(tensors, bits, version)
    assert torch.equal(again.integers, integers)
    assert torch.equal(again.zero, zero) and torch.equal(again.scale, result.scale)


@pytest.mark.parametrize(
    ("recipe", "changes", "version"),
    [
        ("w2a16", {"weights.group_size": 16}, V2),
        ("w3a16", {}, V2),
        ("w4a16", {}, V2),
        ("w4a16", {"weights.bits": 8, "weights.group_size": 32}, V2),
        ("w3a16", {"weights.symmetric": True, "weights.group_size": 32}, V2),
        ("w4a16", {"weights.symmetric": True, "weights.group_size": 16}, V1),
    ],
)
def test_checkpoint_is_the_run(
    opened_run: Opened, tmp_path: Path, recipe: str, changes: dict[str, Any], version: str
) -> None:
    run = opened_run(recipe, changes)
    gptq.write(run, tmp_path / "export", version=version)
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    config = json.loads((tmp_path / "export" / "quantize_config.json").read_text())
    assert json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"] == config
    assert config["checkpoint_format"] == version and config["bits"] == run.spec.bits
    assert config["group_size"] == (run.spec.group_size or -1) and config["sym"] is run.spec.symmetric
    assert config["desc_act"] is False and config["quant_method"] == "gptq"
    for index in range(2):
        for name, result in run.split(index)[0].items():
            prefix = f"model.layers.{index}.{name}."
            layer = {part.removeprefix(prefix): tensor for part, tensor in tensors.items() if part.startswith(prefix)}
            integers, weight = read_layer(layer, config["bits"], version)
            assert integers == result.integers.T.tolist()
            assert torch.equal(weight.T, result.dequantize().double())
    ids = torch.randint(2, 2048, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = gptq.read(tmp_path / "export")(ids).logits
    assert (found - run_logits(run, ids)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("recipe", "changes", "config", "version", "words"),
    [
        ("w4a4kv4", {}, None, V2, "needs .*R3 .* which GPTQ cannot hold"),
        ("w4a16", {"activations.bits": 8}, None, V2, "needs 8-bit activations, which GPTQ"),
        ("w4a16", {"activations.bits": 8, "activations.group_size": 32}, None, V2, "8-bit activations in groups of 32"),
        ("w4a16", {"weights.bits": 5}, None, V2, "GPTQ has 2, 3, 4 and 8 bits, and the run has 5"),
        ("w4a16", {}, None, V1, "this run is asymmetric: use --format gptq"),
        ("w3a16", {}, {"intermediate_size": 80}, V2, "the 80 outputs of mlp.gate_proj are no multiple of 32"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    opened_run: Opened, tmp_path: Path, recipe: str, changes: dict[str, Any], config: Any, version: str, words: str
) -> None:
    run = opened_run(recipe, changes, config)
    with pytest.raises(InputError, match=words):
        gptq.write(run, tmp_path / "export", version=version)
    assert not (tmp_path / "export").exists()


@pytest.fixture
def broken(opened_run: Opened, tmp_path: Path) -> Path:
    gptq.write(opened_run("w2a16", {"weights.group_size": 16}), tmp_path / "export")
    return tmp_path / "export"


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        gptq.read(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 4}, "do not belong together"),
        ({"bits": 5}, "says 5 bits, and GPTQ has 2, 3, 4 and 8"),
        ({"bits": None}, "says None bits"),
        ({"group_size": 32}, "groups, and config.json says group_size 32"),
        ({"group_size": -1}, "groups, and config.json says group_size -1"),
        ({"checkpoint_format": "gptq_v3"}, "in the format gptq_v3, and gptq and gptq_v2 are read"),
        ({"quant_method": "awq"}, "says quant_method awq, and gptq is read"),
    ],
)
def test_a_config_that_contradicts_its_tensors_is_refused(broken: Path, changes: dict[str, Any], words: str) -> None:
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"].update(changes)
    (broken / "config.json").write_text(json.dumps(config))
    assert words in refusal(broken)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, "has no tensor model.layers.2."),
        ({"num_hidden_layers": 1}, "which its config.json has not"),
        ({"intermediate_size": 128}, "config.json asks for"),
        ({"model_type": "mamba"}, "not supported"),
    ],
)
def test_other_sizes_than_those_of_the_tensors_are_refused(broken: Path, changes: dict[str, Any], words: str) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, **changes}))
    assert words in refusal(broken)


def test_damaged_tensors_are_named(broken: Path) -> None:
    file = broken / "model.safetensors"
    tensors = load_file(file)
    whole = file.read_bytes()
    name = "model.layers.1.mlp.up_proj"
    for part in ("qzeros", "scales", "g_idx"):
        save_file({key: tensor for key, tensor in tensors.items() if key != f"{name}.{part}"}, file)
        assert f"has no tensor {name}.{part}" in refusal(broken)
    save_file({**tensors, f"{name}.g_idx": tensors[f"{name}.g_idx"].flip(0)}, file)
    assert "g_idx does not put 64 inputs in 4 groups" in refusal(broken)
    file.write_bytes(whole[:-100])
    assert "is not a whole safetensors file" in refusal(broken)
    file.unlink()
    assert "lacks model.safetensors" in refusal(broken)
    (broken / "config.json").write_text("{")
    assert "holds no gptq checkpoint" in refusal(broken)
