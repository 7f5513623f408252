"""Reads exported checkpoints back, whatever their format: config, tensors, and the stock model of dense tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import InputError
from ..models.checkpoint import INDEX, SINGLE
from ..models.running import what_it_is


def read_config(folder: Path, method: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json without `quantization_config`, and that; `method` is the `quant_method` it must have.

    Raises:
        InputError: the file is missing or damaged, or of another format.
    """
    try:
        config = what_it_is(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        quantization = dict(config.pop("quantization_config"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(f"{folder} holds no {method} checkpoint ({what}): export it again.") from error
    if quantization.get("quant_method") != method:
        raise InputError(
            f"{folder / 'config.json'} says quant_method {quantization.get('quant_method')}, and {method} is read: "
            "export it again."
        )
    return config, quantization


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, sharded or not.

    Raises:
        InputError: a file is missing or damaged, or holds other tensors than its index says.
    """
    tensors: dict[str, Tensor] = {}
    for file in tensor_files(folder):
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise _not_whole(file, error) from error
    return tensors


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a checkpoint, by the headers of its files.

    Raises:
        InputError: as `read_tensors`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in tensor_files(folder):
        try:
            with safe_open(file, framework="pt") as reader:
                shapes |= {name: tuple(reader.get_slice(name).get_shape()) for name in list(reader.keys())}
        except (SafetensorError, OSError) as error:
            raise _not_whole(file, error) from error
    return shapes


def tensor_files(folder: Path) -> list[Path]:
    """The files of a checkpoint, which hold what its index says.

    Raises:
        InputError: one is missing, or holds other tensors.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():
        if not (folder / SINGLE).is_file():
            raise InputError(f"{folder} lacks {SINGLE}: copy or export it again.")
        return [folder / SINGLE]
    try:
        where = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index} is not a valid index ({error}): copy or export it again.") from error
    files = [folder / shard for shard in sorted(set(where.values()))]
    for file in files:
        if not file.is_file():
            raise InputError(f"{folder} lacks {file.name}, which its index names: copy or export it again.")
        try:
            with safe_open(file, framework="pt") as reader:
                found = set(reader.keys())
        except (SafetensorError, OSError) as error:
            raise _not_whole(file, error) from error
        if wrong := found ^ {name for name, shard in where.items() if shard == file.name}:
            raise InputError(f"{file} and its index disagree about {min(wrong)}: copy or export it again.")
    return files


def _not_whole(file: Path, error: Exception) -> InputError:
    return InputError(f"{file} is not a whole safetensors file ({error}): copy or export it again.")


def check_shape(folder: Path, name: str, expected: tuple[int, ...], found: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a tensor is there, in the shape that config.json asks for.

    Raises:
        InputError: it is not.
    """
    if name not in found:
        raise InputError(f"{folder} has no tensor {name}: copy or export it again.")
    if found[name] != expected:
        raise InputError(
            f"{folder}: tensor {name} has shape {found[name]}, and config.json asks for {expected}: "
            "they do not belong together, export the model again."
        )


def stock_model(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """The model that transformers makes of a config, in float32, with dense weights; `folder` is named in errors.

    Raises:
        InputError: a tensor is missing, of no use, or of another shape than the config asks for.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"no model can be made of {folder / 'config.json'} ({error}): export it again.") from error
    tied = dict(model.all_tied_weights_keys)
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, tensor in expected.items():
        check_shape(folder, name, tuple(tensor.shape), shapes)
    if surplus := set(state) - set(expected):
        raise InputError(f"{folder} has a tensor {min(surplus)}, which its config.json has not: export it again.")
    model.load_state_dict({**state, **{name: state[source] for name, source in tied.items()}}, assign=True)
    rotary = model.model.rotary_emb  # its frequencies follow from the config, and are not on the meta device's side
    model.model.rotary_emb = type(rotary)(config=model.config)
    embedding = model.get_input_embeddings()
    if hasattr(embedding, "scalar_embed_scale"):  # of Gemma: no part of a checkpoint either
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale)
    return model.eval()
