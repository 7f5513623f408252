"""safetensors files written as their tensors come: a shard of gigabytes never lies in memory.

The format is a JSON header with the place of every tensor, which comes first, and the tensors' bytes. So bytes are
collected in files by the size of an element, widest first: then every tensor is aligned, as readers need it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

SHARD_BYTES = 5_000_000_000
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}
WIDTHS = (8, 4, 2, 1)
CHUNK = 2**24


class ShardWriter:
    """One safetensors file in the making.

    Args:
        path: of the finished file; others beside it, whose names begin with a dot and end in .tmp, hold its parts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.bytes = 0
        self._entries: dict[int, list[tuple[str, str, list[int], int]]] = {width: [] for width in WIDTHS}

    def _part(self, width: int) -> Path:
        return self.path.with_name(f".{self.path.name}.{width}.tmp")

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor.

        Raises:
            ValueError: the format has no such dtype.
        """
        if tensor.dtype not in DTYPES:
            raise ValueError(f"tensor {name} is of {tensor.dtype}, which safetensors files do not hold here")
        width, size = tensor.element_size(), tensor.numel() * tensor.element_size()
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        with self._part(width).open("ab") as file:
            for chunk in flat.split(CHUNK):
                file.write(memoryview(chunk.cpu().numpy()))
        self._entries[width].append((name, DTYPES[tensor.dtype], list(tensor.shape), size))
        self.names.append(name)
        self.bytes += size

    def finish(self) -> None:
        """Put header and parts together under a temporary name, then give the file its name."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for width in WIDTHS:
            for name, dtype, shape, size in self._entries[width]:
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
                offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for width in WIDTHS:
                if self._entries[width]:
                    with self._part(width).open("rb") as part:
                        shutil.copyfileobj(part, file, CHUNK)
                    self._part(width).unlink()
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def write_shards(
    folder: Path, groups: Iterable[Mapping[str, Tensor]], limit: int = SHARD_BYTES
) -> list[tuple[str, list[str], int]]:
    """Write tensors, a group never apart, into files shard-0.tmp, shard-1.tmp, ... of at most `limit` bytes.

    A group larger than `limit` is a file of its own. One group at most is in memory.

    Returns:
        (file, tensor names, bytes) of each.
    """
    shards: list[ShardWriter] = []
    for group in groups:
        size = sum(tensor.numel() * tensor.element_size() for tensor in group.values())
        if not shards or (shards[-1].bytes and shards[-1].bytes + size > limit):
            if shards:
                shards[-1].finish()
            shards.append(ShardWriter(folder / f"shard-{len(shards)}.tmp"))
        for name, tensor in group.items():
            shards[-1].add(name, tensor)
    if shards:
        shards[-1].finish()
    return [(shard.path.name, shard.names, shard.bytes) for shard in shards]
