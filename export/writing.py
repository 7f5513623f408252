"""Writes the model folder of a finished run: config, tokenizer, generation config and sharded safetensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError
from ..models.checkpoint import INDEX, SINGLE, Checkpoint
from ..models.families import Family
from ..models.matrices import StoredMatrix
from ..models.outer_layers import OuterLayers
from ..models.running import what_it_is
from .packed_matrix import PackedMatrix
from .packing import part_names
from .shards import SHARD_BYTES, write_shards
from .spec import METHOD, Spec

_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "LICENSE*",
)


def save_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write safetensors, readable by whom the umask lets read: the library itself makes it the owner's alone."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def write_native(
    folder: Path,
    source: Checkpoint,
    spec: Spec,
    groups: Iterable[dict[str, Tensor]],
    *,
    tied: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `folder` as a checkpoint that transformers loads after `import rotoboa`.

    Args:
        folder: made new; what an interrupted export left there is replaced.
        source: the full-precision checkpoint, for its config and tokenizer.
        groups: tensors by their full names, a decoder block at a time; shards are filled in this order.
        tied: embedding and head are one, and `groups` have no head.
        shard_bytes: the most bytes of one tensor file.
    """
    config = what_it_is(json.loads((source.folder / "config.json").read_text(encoding="utf-8")))
    config["tie_word_embeddings"] = tied  # where rotated, the two are different
    if source.family.sight and "tie_word_embeddings" in config.get("text_config", {}):
        config["text_config"]["tie_word_embeddings"] = tied  # older ones have it there, and it counts
    if "torch_dtype" not in config:  # else transformers takes it from the first tensor, which may be a scale
        config.setdefault("dtype", str(source.dtype).removeprefix("torch."))
    config["quantization_config"] = {"quant_method": METHOD, **spec.to_dict()}
    write_checkpoint(folder, source.folder, config, groups, shard_bytes=shard_bytes)


def write_checkpoint(
    folder: Path,
    source: Path,
    config: dict[str, Any],
    groups: Iterable[dict[str, Tensor]],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint in the layout of the hub: tensors, index, config.json, and what goes with them.

    Args:
        folder: made new; what is there is replaced.
        source: the folder whose tokenizer, generation config and licence are copied.
        config: the whole of config.json.
        groups: tensors by their full names; shards are filled in this order, and a group is not split.
        shard_bytes: the most bytes of one tensor file, where its first group is not larger.
    """
    fresh_folder(folder)
    shards = write_shards(folder, groups, shard_bytes)
    if len(shards) == 1:
        (folder / shards[0][0]).replace(folder / SINGLE)
    else:
        weight_map, total = {}, 0
        for i, (temporary, names, size) in enumerate(shards):
            final = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            (folder / temporary).replace(folder / final)
            weight_map.update(dict.fromkeys(names, final))
            total += size
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_extras(folder, source, config)


def fresh_folder(folder: Path) -> None:
    """Make a folder; what is there is removed."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def write_extras(folder: Path, source: Path, config: dict[str, Any]) -> None:
    """Write config.json; copy tokenizer, chat template, generation config and licence, as far as `source` has them."""
    for file in copied_files(source):
        shutil.copyfile(file, folder / file.name)
        if file.name == "generation_config.json":
            _keep_what_it_is(folder / file.name)
    write_json(folder / "config.json", config)


def _keep_what_it_is(file: Path) -> None:
    """Take the fields out of a generation config that say how to run: a cache by name would keep ours out."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return  # it is as the checkpoint had it, and transformers says so where it is read
    if isinstance(fields, dict) and fields != (kept := what_it_is(fields)):
        write_json(file, kept)


def copied_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that go into the model folder as they are."""
    return sorted({file for pattern in _COPIED for file in folder.glob(pattern) if file.is_file()})


def read_outer_layers(folder: Path, family: Family) -> OuterLayers:
    """What is outside the blocks of a model folder, as stored, embedding and head not read yet.

    Raises:
        InputError: some of it is missing, or a file is damaged.
    """
    spec = _spec_of(folder)
    tied = is_tied(folder) or spec.tied_head
    names, large = set(OuterLayers.names(family)), {f"{family.embedding}.weight", f"{family.head}.weight"}
    names |= {
        f"{module}.{part}" for module in (family.embedding, family.head) for part in part_names(spec.outer(module))
    }
    names -= {f"{family.head}.weight"} if tied else set()
    found: dict[str, Tensor | StoredMatrix] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as reader:
                for name in names & set(reader.keys()):
                    shape = torch.Size(reader.get_slice(name).get_shape())
                    found[name] = (
                        StoredMatrix(file, name, shape, name, "run the recipe again")
                        if name in large
                        else reader.get_tensor(name)
                    )
        except SafetensorError as error:
            raise InputError(f"{file} is not a whole safetensors file ({error}): run the recipe again.") from error
    matrices = packed_matrices(found, family, spec)
    missing = OuterLayers.missing(family, matrices, tied=tied, turned=spec.turns_head)
    if missing:
        raise InputError(f"{folder} lacks {', '.join(missing)}: run the recipe again.")
    return OuterLayers.of(family, matrices)


def packed_matrices(found: Mapping[str, Any], family: Family, spec: Spec) -> dict[str, Any]:
    """The tensors of `OuterLayers` by their full names, where those of a packed embedding or head become its matrix."""
    result = dict(found)
    for module in (family.embedding, family.head):
        args = spec.outer(module)
        names = part_names(args) if args.quantizes else ()
        parts = {part: result.pop(f"{module}.{part}") for part in names if f"{module}.{part}" in result}
        if names and len(parts) == len(names):
            columns = len(found[f"{family.final_norm}.weight"])
            result[f"{module}.weight"] = PackedMatrix(parts, args, columns)
    return result


def _spec_of(folder: Path) -> Spec:
    """What config.json of a native checkpoint says of it."""
    fields = dict(_config_of(folder).get("quantization_config") or {})
    return Spec.from_dict(fields) if fields.get("quant_method") == METHOD else Spec(bits=8)


def is_tied(folder: Path) -> bool:
    """Whether embedding and head of a model folder are one, by its config.json.

    Raises:
        InputError: it cannot be read.
    """
    return bool(_config_of(folder).get("tie_word_embeddings"))


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no fields")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder / 'config.json'} cannot be read ({error}): run the recipe or export it again."
        ) from error
    return config


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON into a folder that is not in use yet."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
