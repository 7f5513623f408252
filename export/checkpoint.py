"""Writes the model folder of a finished run: config, tokenizer, generation config and sharded safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..models.checkpoint import INDEX, SINGLE, Checkpoint
from .native import METHOD
from .spec import Spec

SHARD_BYTES = 5_000_000_000
_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "*.jinja",
    "generation_config.json",
    "LICENSE*",
)


def write_native(folder: Path, source: Checkpoint, spec: Spec, groups: Iterable[dict[str, Tensor]]) -> None:
    """Write `folder` as a checkpoint that transformers loads after `import rotoboa`.

    Args:
        folder: made new; what an interrupted export left there is replaced.
        source: the full-precision checkpoint, for its config and tokenizer.
        groups: tensors by their full names, a decoder block at a time; shards are filled in this order.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    shards = _write_shards(folder, groups)
    if len(shards) == 1:
        (folder / shards[0][0]).replace(folder / SINGLE)
    else:
        weight_map, total = {}, 0
        for i, (temporary, names, size) in enumerate(shards):
            final = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            (folder / temporary).replace(folder / final)
            weight_map.update(dict.fromkeys(names, final))
            total += size
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for pattern in _COPIED:
        for file in source.folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = False  # the two are rotated differently
    config["quantization_config"] = {"quant_method": METHOD, **spec.to_dict()}
    _write_json(folder / "config.json", config)


def _write_shards(folder: Path, groups: Iterable[dict[str, Tensor]]) -> list[tuple[str, list[str], int]]:
    """(file, tensor names, bytes) of each shard; at most one shard and one group are in memory."""
    shards: list[tuple[str, list[str], int]] = []
    waiting: dict[str, Tensor] = {}

    def flush() -> None:
        if waiting:
            name = f"shard-{len(shards)}.tmp"
            save_file(
                {key: value.cpu().contiguous() for key, value in waiting.items()}, folder / name, {"format": "pt"}
            )
            shards.append((name, list(waiting), _bytes(waiting)))
            waiting.clear()

    for group in groups:
        if waiting and _bytes(waiting) + _bytes(group) > SHARD_BYTES:
            flush()
        waiting.update(group)
    flush()
    return shards


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
