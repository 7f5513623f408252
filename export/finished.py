"""A finished run as exports read it: its blocks, its ends and its config, without the original checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from ..boa.online.served_cache import OWN
from ..boa.scheme import QuantizationArgs
from ..boa.solver.rounding import Quantized
from ..errors import InputError
from ..models.families import Family, check_type, family_for
from ..models.outer_layers import OuterLayers
from ..models.running import floats_read, what_it_is
from ..models.shape import Shape
from .joined_layers import can_join, joined, on_the_hub, parts_of
from .packing import ALL_PARTS, part_names, unpack_block, unpacked
from .spec import METHOD, Spec
from .writing import read_outer_layers

Stored = Callable[[Quantized, QuantizationArgs], dict[str, Tensor]]


@dataclass(frozen=True)
class Finished:
    """What a finished run left on disk.

    Attributes:
        folder: its model folder, for embedding, norm, head, config and tokenizer.
        blocks: the files of its decoder blocks, in order.
        config: config.json without `quantization_config`.
        spec: what the run is, with the clip ratios that were searched.
    """

    folder: Path
    blocks: Sequence[Path]
    config: Mapping[str, Any]
    spec: Spec
    family: Family
    shape: Shape

    @classmethod
    def open(cls, folder: Path, blocks: Sequence[Path]) -> Finished:
        """Read the config of a run's model folder.

        Raises:
            InputError: it is missing, damaged, or of another number of blocks.
        """
        try:
            config = what_it_is(json.loads((folder / "config.json").read_text(encoding="utf-8")))
            quantization = dict(config.pop("quantization_config"))
            if quantization.get("quant_method") != METHOD:
                raise ValueError(f"it is in the format {quantization.get('quant_method')}")
            check_type(config["model_type"], str(folder))
            whole = AutoConfig.for_model(**floats_read(config))
            family, shape = family_for(whole, str(folder)), Shape.of(whole)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
            what = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise InputError(f"{folder} holds no model of a finished run ({what}): run the recipe again.") from error
        if len(blocks) != shape.blocks:
            raise InputError(f"the run has {len(blocks)} blocks, and its config.json {shape.blocks}: run it again.")
        return cls(folder, blocks, config, Spec.from_dict(quantization), family, shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all that is not quantized, as config.json has it."""
        return getattr(torch, str(self.config.get("dtype") or self.config.get("torch_dtype")))

    def transformers_config(self) -> PretrainedConfig:
        """The config as transformers reads it, without quantization."""
        return AutoConfig.for_model(**floats_read(dict(self.config)))

    def outer_layers(self) -> OuterLayers:
        """What is outside the blocks, as the run computed with it."""
        return read_outer_layers(self.folder, self.family)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding, with nothing before it; `config` denies it of a packed one."""
        return self.outer_layers().untied().tied

    def block(self, index: int) -> dict[str, Tensor]:
        """The tensors of block `index` by their names inside the block: `qweight`, `scale`, `zero`, and the others.

        Raises:
            InputError: the file is missing or damaged.
        """
        try:
            return load_file(self.blocks[index])
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.blocks[index]} cannot be read ({error}): run the recipe again.") from error

    def split(self, index: int) -> tuple[dict[str, Quantized], dict[str, Tensor]]:
        """Block `index` as integers, scale and zero point of every projection, and its other tensors."""
        tensors = self.block(index)
        columns = projection_columns(self.family, self.shape, index)
        quantized = unpack_block(tensors, self.spec.schemes(self.family, index), columns)
        packed = {f"{name}.{part}" for name in quantized for part in ALL_PARTS}
        return quantized, {name: tensor for name, tensor in tensors.items() if name not in packed}

    def towers(self) -> Iterator[dict[str, Tensor]]:
        """What a model that sees has beside its decoder, by full names, a tensor at a time.

        Raises:
            InputError: a file is damaged.
        """
        prefixes = self.family.sight.prefixes if self.family.sight else ()
        for file in sorted(self.folder.glob("*.safetensors")) if prefixes else ():
            try:
                with safe_open(file, framework="pt") as reader:
                    for name in sorted(name for name in reader.keys() if name.startswith(prefixes)):  # noqa: SIM118
                        yield {name: reader.get_tensor(name)}
            except SafetensorError as error:
                raise InputError(f"{file} is not a whole safetensors file ({error}): run the recipe again.") from error

    @property
    def columns(self) -> dict[str, int]:
        """How many inputs each projection has, where all blocks are alike."""
        return projection_columns(self.family, self.shape)

    @property
    def rows(self) -> dict[str, int]:
        """How many outputs each projection has, where all blocks are alike."""
        return projection_rows(self.family, self.shape)

    def groups(self, stored: Stored | None = None) -> Iterator[dict[str, Tensor]]:
        """All tensors by their full names: embedding, each block, then norm and head.

        Args:
            stored: the tensors that a format has for one projection, by the last part of their names, from its result
                and the scheme of its weights; None: ours. Quantized ends are stored like it. Layers and their names
                are then those of the hub's checkpoints, see `joined_layers`.
        """
        f = self.family
        outer = self.outer_layers() if stored is None else self.outer_layers().untied()
        yield self._ends(outer.before(f), stored)
        for index in range(self.shape.blocks):
            if stored is None:
                yield {f"{f.layers}.{index}.{name}": tensor for name, tensor in self.block(index).items()}
                continue
            own, schemes = f.at(index), self.spec.schemes(f, index)
            whole = {merged.name: parts_of(merged)[0] for merged in own.merged}
            quantized, tensors = joined(*self.split(index), own, self.shape.at(index))
            for name, result in quantized.items():
                parts = stored(result, schemes[whole.get(name, name)].weights)
                tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            yield {on_the_hub(f"{f.layers}.{index}.{name}", f): tensor for name, tensor in tensors.items()}
        yield self._ends(outer.after(f), stored)
        yield from self.towers()

    def _ends(self, tensors: dict[str, Tensor], stored: Stored | None) -> dict[str, Tensor]:
        """Tensors outside the blocks, those of a packed embedding or head as a format has them."""
        for module in (self.family.embedding, self.family.head):
            args = self.spec.outer(module)
            parts = {part: tensors[f"{module}.{part}"] for part in part_names(args) if f"{module}.{part}" in tensors}
            if stored is not None and parts:
                found = stored(unpacked(parts, args, self.shape.hidden), args)
                packed = {f"{module}.{part}" for part in parts}
                tensors = {name: tensor for name, tensor in tensors.items() if name not in packed}
                tensors |= {f"{module}.{part}": tensor for part, tensor in found.items()}
        return tensors


def projection_columns(family: Family, shape: Shape, index: int = 0) -> dict[str, int]:
    """How many inputs each projection of block `index` has."""
    own = family.sizes or {}
    family, shape = family.at(index), shape.at(index)
    widths = {"qkv": shape.hidden, "output": shape.query_width, "gate_up": shape.hidden, "down": shape.ffn}
    shared = {family.shared_down: shape.shared_ffn} if family.shared else {}
    found = {name: widths.get(site, 0) for name, site in family.sites.items()} | shared
    return found | {name: own[name][1] for name in found if name in own}


def projection_rows(family: Family, shape: Shape, index: int = 0) -> dict[str, int]:
    """How many outputs each projection of block `index` has."""
    own = family.sizes or {}
    family, shape = family.at(index), shape.at(index)
    sizes = {"qkv": shape.query_width, "output": shape.hidden, "gate_up": shape.ffn, "down": shape.hidden}
    others = {} if family.mixed else {family.key: shape.key_width, family.value: shape.key_width}
    if family.shared:
        others |= dict.fromkeys(family.expert(family.expert_count)[:2], shape.shared_ffn)
    found = {name: sizes.get(site, 0) for name, site in family.sites.items()}
    return (
        found
        | {name: rows for name, rows in others.items() if name in found}
        | {name: own[name][0] for name in found if name in own}
    )


def numbers_in_blocks(family: Family, shape: Shape) -> int:
    """How many weights the projections of all blocks have."""
    found = 0
    for index in range(shape.blocks):
        rows, columns = projection_rows(family, shape, index), projection_columns(family, shape, index)
        found += sum(rows[name] * columns[name] for name in rows)
    return found


def refuse_layout(family: Family, name: str, *, joins: bool = False) -> None:
    """Refuse a family whose readers do not find its parts where they are quantized.

    Args:
        family: that is written.
        name: of the format.
        joins: merged layers are written whole in it, experts each by itself, and what stands in place of attention.

    Raises:
        InputError: its parts are others, or a LayerNorm has lost its bias to them.
    """
    if family.generic:
        raise InputError(
            f"{name} is written for architectures with a row in docs/models.md, and this is a '{family.model_type}': "
            "use --format native."
        )
    if not (has_joined_layout(family) if joins else has_plain_layout(family)):
        raise InputError(
            f"{name} is written for models with a tensor a projection and RMSNorm, and '{family.model_type}' has "
            "other parts: use --format native."
        )


def refuse_sight(family: Family, name: str) -> None:
    """Refuse a family that sees, in a format that is written for decoders alone.

    Raises:
        InputError: it does.
    """
    if family.sight is not None:
        raise InputError(
            f"{name} is written for models of text alone, and '{family.model_type}' sees: use --format "
            "compressed-tensors or native."
        )


def has_plain_layout(family: Family) -> bool:
    """Whether every projection is a tensor by itself, with nothing folded into biases that its class has not."""
    return not (family.merged or family.experts or family.layer_norm or family.generic or family.hybrid)


def has_joined_layout(family: Family) -> bool:
    """Whether that is so once merged layers are whole again, with each expert by itself."""
    return not (family.layer_norm or family.generic) and can_join(family)


def refuse_online(
    spec: Spec,
    name: str,
    *,
    activations: bool = False,
    inputs: bool = False,
    server: str | None = None,
    scales: bool = False,
) -> None:
    """Refuse a run that computes with more than weights at run time, in a format that holds weights alone.

    `activations` and `inputs` say that the format holds these: quantizers of inputs, and R1 and R4 before layers;
    `server`, whose own cache the run may have followed, since that reads the format; `scales`, that it holds those of
    a cache in FP8.

    Raises:
        InputError: R1 online, R3, R4, or a quantizer of activations or cache is on.
    """
    online = []
    if spec.online_r1 and not inputs:
        online.append("R1 online (a rotation before q, k, v, gate and up)")
    if spec.heads:
        online.append("a rotation over all heads (online, before O)")
    if spec.r3:
        online.append("R3 (an online rotation of queries and keys)")
    if spec.r4 and not inputs:
        online.append("R4 (an online rotation before down)")
    inputs_of = (scheme.input_activations for scheme in (spec.scheme, *spec.layers.values()))
    args = next((args for args in inputs_of if args.quantizes), None)
    if spec.activation_directions:
        online.append(f"{spec.activation_directions} directions of inputs in 8 bits")
    if args is not None and not activations:
        groups = f" in groups of {args.group_size}" if args.group_size else ""
        online.append(f"{args.num_bits}-bit activations{groups}")
    floats = spec.cache_format == "fp8"
    if spec.quantizes_cache and (spec.cache_served_by != server or (floats and not scales)):
        sink = f", its {spec.sink} in 16 bits" if spec.sink else ""
        whose = "" if spec.cache_served_by == OWN else f", as {spec.cache_served_by} keeps it"
        kind = f"a cache of {spec.key_bits}-bit keys and {spec.value_bits}-bit values"
        online.append(f"{kind}{' in FP8' if floats else ''}{sink}{whose}")
    if online:
        raise InputError(
            f"the run needs {' and '.join(online)}, which {name} cannot hold and its readers would leave out: "
            "use --format native, or quantize with a recipe without it, such as w4a16."
        )
