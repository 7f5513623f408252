"""Looks at a checkpoint in the compressed-tensors format before transformers loads it, which fills gaps with noise."""

from __future__ import annotations

import re
from pathlib import Path

from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus, QuantizationType
from compressed_tensors.utils import match
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig

from ...boa.online.attention import CACHE_SCALES
from ...errors import InputError
from ...models.families import Family, family_for, family_of
from ...models.running import floats_read
from ...models.shape import Shape
from ..compressed_inputs import NAME
from ..finished import projection_columns, projection_rows
from ..joined_layers import joined_names
from ..reading import check_shape, read_config, read_shapes
from .compressed_floats import FORMATS, float_shapes, input_shapes
from .compressed_tensors import VLLM_ALONE


def inspect(folder: Path) -> None:
    """Compare the headers of a checkpoint with its config: transformers fills gaps with noise.

    Raises:
        InputError: a file is damaged, a tensor is missing or of another shape, or the config is not one of ours.
    """
    config, quantization = read_config(folder, NAME)
    try:
        stored = CompressionFormat(quantization.get("format"))
        if quantization.get("quantization_status") == VLLM_ALONE:
            quantization["quantization_status"] = QuantizationStatus.COMPRESSED.value
        groups = QuantizationConfig.model_validate(quantization)
        known = [CompressionFormat.int_quantized, *FORMATS.values()]
        each = {group.format for group in groups.config_groups.values()}
        if stored not in known or each != {stored} or any(not g.weights for g in groups.config_groups.values()):
            wanted = next((one.value for one in known if one in each), FORMATS["int"].value)
            raise ValueError(f"format {quantization.get('format')}, where {wanted} is read")
        family_of(str(config.get("model_type")), str(folder))
        whole = AutoConfig.for_model(**floats_read(config))
        family, shape = family_for(whole, str(folder)), Shape.of(whole)
        sizes = _sizes(family, shape)
        layers = {name: _scheme_of(name, nn.Linear(1, 1), groups) for name in sizes}
        ends = {family.embedding: _scheme_of(family.embedding, nn.Embedding(1, 1), groups)}
        if not config.get("tie_word_embeddings"):
            ends[family.head] = _scheme_of(family.head, nn.Linear(1, 1), groups)
    except (ValueError, TypeError, AttributeError, re.error, StrictDataclassError) as error:
        what = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"{folder / 'config.json'} cannot be used ({what}): export the model again.") from error
    found = read_shapes(folder)
    for name, scheme in layers.items():
        for part, size in _shapes(scheme, stored, *sizes[name]).items():
            check_shape(folder, f"{name}.{part}", size, found)
    for index in range(shape.blocks) if groups.kv_cache_scheme else ():
        for part in CACHE_SCALES.values():
            check_shape(folder, f"{family.layers}.{index}.{family.attention}.{part}", (1,), found)
    for name, scheme in ends.items():
        for part, size in _shapes(scheme, stored, shape.vocabulary, shape.hidden).items():
            check_shape(folder, f"{name}.{part}", size, found)
    check_shape(folder, f"{family.final_norm}.weight", (shape.hidden,), found)
    if any(name.startswith(f"{family.layers}.{shape.blocks}.") for name in found):
        raise InputError(f"{folder} has more blocks than the {shape.blocks} of its config.json: export it again.")


def _sizes(family: Family, shape: Shape) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the projections of all blocks, by their full names in the files."""
    found = dict[str, tuple[int, int]]()
    for index in range(shape.blocks):
        rows, columns = projection_rows(family, shape, index), projection_columns(family, shape, index)
        for name in rows:
            (full,) = joined_names([f"{family.layers}.{index}.{name}"], family)
            found[full] = (found.get(full, (0, 0))[0] + rows[name], columns[name])
    return found


def _scheme_of(layer: str, module: nn.Module, config: QuantizationConfig) -> QuantizationScheme | None:
    """That of a layer, as the format's library finds it; None where it is left as it is."""
    if match.is_match(layer, module, config.ignore or []):
        return None
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    found = match.match_targets(layer, module, schemes)
    return schemes[found[0]] if found else None


def _shapes(
    scheme: QuantizationScheme | None, stored: CompressionFormat, rows: int, columns: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's tensors by the last part of their names."""
    args = None if scheme is None else scheme.weights
    if scheme is None or args is None:
        return {"weight": (rows, columns)}
    if args.type == QuantizationType.FLOAT:
        return float_shapes(args, rows, columns) | input_shapes(scheme.input_activations)
    groups = -(-columns // args.group_size) if args.group_size else 1
    if stored == CompressionFormat.int_quantized:
        return {"weight": (rows, columns), "weight_scale": (rows, groups)}
    shapes: dict[str, tuple[int, ...]] = {
        "weight_packed": (rows, -(-columns * args.num_bits // 32)),
        "weight_scale": (rows, groups),
        "weight_shape": (2,),
    }
    if not args.symmetric:
        shapes["weight_zero_point"] = (-(-rows * args.num_bits // 32), groups)
    return shapes
