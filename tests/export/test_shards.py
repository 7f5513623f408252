"""Shards written piece by piece are safetensors files like any other."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rotoboa.export.shards import CHUNK, DTYPES, ShardWriter, write_shards


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for index, dtype in enumerate(DTYPES):
        values = torch.randint(0, 2, (3, 5, index + 1), generator=generator)  # odd numbers of bytes
        found[f"tensor.{index}"] = values.to(dtype)
    return found | {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "turned": torch.arange(6.0).view(2, 3).T}


def test_read_back(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.safetensors")
    for name, tensor in tensors().items():
        writer.add(name, tensor)
    writer.finish()
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    with safe_open(tmp_path / "a.safetensors", "pt") as reader:
        assert reader.metadata() == {"format": "pt"}
    assert writer.bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors().values())


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a")
    for name, tensor in reversed(tensors().items()):
        writer.add(name, tensor)
    writer.finish()
    content = (tmp_path / "a").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in tensors().items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_tensors_larger_than_a_chunk(tmp_path: Path) -> None:
    tensor = torch.arange(CHUNK // 4 + 1000, dtype=torch.int32)
    write_shards(tmp_path, [{"long": tensor}])
    assert torch.equal(load_file(tmp_path / "shard-0.tmp")["long"], tensor)


def test_groups_stay_together_and_shards_below_the_limit(tmp_path: Path) -> None:
    groups = [{f"{i}.a": torch.full((10,), i), f"{i}.b": torch.ones(5)} for i in range(5)]  # 100 bytes each
    shards = write_shards(tmp_path, [*groups, {"large": torch.zeros(300, dtype=torch.uint8)}], 250)
    assert [(name, size) for name, _, size in shards] == [
        ("shard-0.tmp", 200), ("shard-1.tmp", 200), ("shard-2.tmp", 100), ("shard-3.tmp", 300),
    ]  # fmt: skip
    assert shards[1][1] == ["2.a", "2.b", "3.a", "3.b"]
    assert {file.name for file in tmp_path.iterdir()} == {name for name, _, _ in shards}
    for name, names, _ in shards:
        assert sorted(load_file(tmp_path / name)) == sorted(names)


def test_nothing(tmp_path: Path) -> None:
    assert write_shards(tmp_path, []) == [] and not list(tmp_path.iterdir())


def test_a_dtype_without_a_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tensor x is of torch\.complex64"):
        ShardWriter(tmp_path / "a").add("x", torch.zeros(1, dtype=torch.complex64))
