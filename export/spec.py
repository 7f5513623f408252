"""What a native checkpoint says of itself: everything the loader needs to run it, as stored in config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..boa.online.activations import OWN, DynamicQuantizer, stock_clip
from ..boa.online.attention import AttentionTransform, CacheQuantizer
from ..boa.online.directions import DIRECTED, directed
from ..boa.online.float8 import StaticFloat8
from ..boa.online.served_cache import NEIGHBOURS, ServedQuantizer
from ..boa.online.transforms import InputQuantizer, InputTransform, OnlineTransforms
from ..boa.scheme import FULL, QuantizationArgs, QuantizationScheme
from ..errors import InputError
from ..models.families import Family
from ..models.shape import Shape
from ..rotation.hadamard import Hadamard
from ..rotation.rotate import before_output, input_width
from .spec_fields import without_meaning

METHOD = "rotoboa"  # quant_method in config.json
FORMAT_VERSION = 3
READABLE = (1, 2, 3)
"""Version 1 had clip ratios by block and site, which were searched on calibration text; 2 has one scheme for all."""


@dataclass(frozen=True)
class Spec:
    """Of every block alike, but for `layers` and `clips`.

    Attributes:
        bits, group_size, symmetric: of the weights; `group_size` None is one group per output channel.
        r1, r2: folded into the weights, for information; r3, r4: online Hadamards of head_dim and ffn.
        r4_blocks: R4 is of blocks of the largest power of two that divides ffn, where it need not be.
        blocks: channels of a diagonal block of R1, R2 and R4; None: all of them, or as `r4_blocks` has R4.
        online_r1: R1 is an online Hadamard of hidden, at the inputs of q, k, v, gate and up.
        heads: the input of O has an online rotation over all heads.
        activation_*, key_bits, value_bits, cache_clip: dynamic quantizers; 16 bits are none.
        cache_sink: how many positions of the cache, from the first, are not quantized.
        cache_center: keys are quantized without the center that each block has for them.
        cache_served_by: of `SERVERS`: a runtime's cache, which turns and rounds by itself, in place of the above.
        cache_format: int, or fp8: keys and values in E4M3, on a scale for those of a block, which it has itself.
        activation_group: input channels that share a dynamic scale, after the online rotation; None: all of a token.
        activation_search, cache_search: each vector chooses its own clip ratio, in place of the one above.
        activation_directions: leading directions of the inputs of q, k, v, O, gate and up that are kept in 8 bits.
        activation_dynamic: inputs in FP8 have a scale for each token; if not, a layer has one for its input.
        activation_convention: whose scales inputs have, of `CONVENTIONS`: a reader's in place of clip and search.
        type, activation_type: int, or float: in four bits and groups that say which format, see `boa.scheme`.
        layers: by the names of modules, the schemes of those that differ from the above; embedding and head are in full
            precision where they are not named.
        tied_head: the head is the packed embedding, which is stored once.
        clips: of format version 1, clip ratios by block and site, in place of those above; None: there are none.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = False
    r1: bool = True
    r2: bool = True
    r3: bool = False
    r4: bool = False
    activation_bits: int = 16
    activation_symmetric: bool = True
    activation_clip: float = 1.0
    key_bits: int = 16
    value_bits: int = 16
    cache_clip: float = 1.0
    online_r1: bool = False
    r4_blocks: bool = False
    heads: bool = False
    cache_sink: int = 0
    activation_group: int | None = None
    activation_search: bool = False
    activation_convention: str = OWN
    cache_search: bool = False
    cache_center: bool = False
    cache_served_by: str = OWN
    cache_format: str = "int"
    activation_dynamic: bool = True
    activation_directions: int = 0
    tied_head: bool = False
    type: str = "int"
    activation_type: str = "int"
    blocks: int | None = None
    layers: Mapping[str, QuantizationScheme] = field(default_factory=dict)
    clips: Sequence[Mapping[str, float]] | None = None
    format_version: int = FORMAT_VERSION

    @property
    def scheme(self) -> QuantizationScheme:
        """Of every layer that `layers` does not name."""
        return QuantizationScheme(
            QuantizationArgs(self.bits, self.group_size, self.symmetric, self.type),
            QuantizationArgs(
                self.activation_bits, self.activation_group, self.activation_symmetric, self.activation_type
            ),
        )

    def schemes(self, family: Family, index: int) -> dict[str, QuantizationScheme]:
        """Those of the projections of block `index`, by their names inside the block."""
        whole, inside = self.scheme, family.at(index).projections
        return {name: self.layers.get(f"{family.layers}.{index}.{name}", whole) for name in inside}

    def outer(self, module: str) -> QuantizationArgs:
        """That of the weights of embedding or head, which are in full precision where `layers` does not name them."""
        return self.layers[module].weights if module in self.layers else QuantizationArgs()

    def inside(self, prefix: str) -> Spec:
        """The same for a model whose modules have names without this prefix."""
        if not prefix:
            return self
        return replace(self, layers={name.removeprefix(prefix): scheme for name, scheme in self.layers.items()})

    @property
    def quantizes_inputs(self) -> bool:
        """Whether the input of any layer is quantized; where `layers` names all of them, the others count too."""
        return any(scheme.input_activations.quantizes for scheme in (self.scheme, *self.layers.values()))

    @property
    def has_zero_points(self) -> bool:
        """Whether any weights are not symmetric; where `layers` names all of them, the others count too."""
        schemes = (self.scheme, *self.layers.values())
        return any(scheme.weights.quantizes and not scheme.weights.symmetric for scheme in schemes)

    @property
    def without_inputs(self) -> Spec:
        """The same with the inputs of all layers in 16 bits."""
        layers = {name: replace(scheme, input_activations=QuantizationArgs()) for name, scheme in self.layers.items()}
        return replace(self, activation_bits=FULL, layers=layers)

    def transforms(self, shape: Shape, family: Family, index: int = 0) -> OnlineTransforms:
        """The online transforms of block `index` of a decoder of this family and shape."""
        family, shape, schemes = family.at(index), shape.at(index), self.schemes(family, index)
        clips = {} if self.clips is None else self.clips[index]
        r1 = self.r1_of(shape)
        heads = before_output(family, shape) if self.heads else None
        rotations = {"qkv": r1, "output": heads, "gate_up": r1, "down": self.r4_of(shape), "latent": None}
        widths = {"qkv": shape.hidden, "gate_up": shape.hidden, "output": input_width(family, shape)}
        inputs = dict[str, InputTransform]()
        for name, site in family.sites.items():  # projections of one site have one input
            quantizer = self._quantizer(schemes[name].input_activations, clips.get(site, self.activation_clip))
            if site in DIRECTED and isinstance(quantizer, DynamicQuantizer):
                quantizer = directed(quantizer, widths[site], self.activation_directions)
            inputs[site] = InputTransform(rotations[site], quantizer)
        attention = AttentionTransform(
            Hadamard.of(shape.head_dim) if self.r3 else None,
            key=self._cache_quantizer(self.key_bits, clips.get("key", self.cache_clip), shape, family),
            value=self._cache_quantizer(self.value_bits, clips.get("value", self.cache_clip), shape),
            sink=self.cache_sink,
            centered=self.cache_center and self.key_bits < 16,
        )
        return OnlineTransforms(
            **inputs,
            attention=AttentionTransform() if family.mixed else attention,
            shared_rotation=self.r4_of(replace(shape, ffn=shape.shared_ffn)) if shape.shared_ffn else None,
        )

    def _quantizer(self, args: QuantizationArgs, clip: float) -> InputQuantizer | None:
        search = self.activation_search
        if args.format == "fp8" and not self.activation_dynamic:
            return StaticFloat8()
        if args.format != "int":
            return DynamicQuantizer(args.num_bits, group_size=args.group_size, format=args.format)
        if self.activation_convention != OWN:
            clip = stock_clip(args.num_bits, self.activation_convention, symmetric=args.symmetric)
            search = False
        return DynamicQuantizer.of(args.num_bits, args.symmetric, clip, args.group_size, search=search)

    def _cache_quantizer(
        self, bits: int, clip: float, shape: Shape, of_keys: Family | None = None
    ) -> CacheQuantizer | None:
        if self.cache_format == "fp8":
            return StaticFloat8() if bits < FULL else None
        if self.cache_served_by != OWN:
            reordered = self.cache_served_by == "llama.cpp" and of_keys is not None and of_keys.model_type in NEIGHBOURS
            served = ServedQuantizer(self.cache_served_by, bits, shape.head_dim, of_keys is not None, reordered)
            return served if bits < FULL else None
        return DynamicQuantizer.of(bits, False, clip, search=self.cache_search)

    @property
    def quantizes_cache(self) -> bool:
        """Whether keys or values are quantized."""
        return min(self.key_bits, self.value_bits) < FULL

    @property
    def without_cache(self) -> Spec:
        """The same with keys and values in 16 bits."""
        return replace(self, key_bits=FULL, value_bits=FULL)

    @property
    def turned(self) -> bool:
        """Whether the residual stream itself is rotated, embedding and head with it."""
        return self.r1 and not self.online_r1

    @property
    def turns_head(self) -> bool:
        """Whether the packed embedding of a rotated stream is the head, with a matrix before it."""
        return self.tied_head and self.turned

    @property
    def sink(self) -> str:
        """The positions of the cache that are not quantized, in words; empty where there are none."""
        return f"first {self.cache_sink} positions" if self.cache_sink > 1 else "first position" * self.cache_sink

    @property
    def unrotated(self) -> Spec:
        """The same quantizers, with nothing else that runs online and no scales of inputs that calibration would have
        to find: the model rounded to nearest, to compare with.
        """
        plain = replace(self, online_r1=False, heads=False, r3=False, r4=False, cache_center=False)
        return replace(plain, activation_dynamic=True, activation_directions=0)

    def r1_of(self, shape: Shape) -> Hadamard | None:
        """The online Hadamard of the inputs of q, k, v, gate and up."""
        return Hadamard.of(shape.hidden, block=self.blocks) if self.online_r1 else None

    def r4_of(self, shape: Shape) -> Hadamard | None:
        """The online Hadamard of down's input."""
        return Hadamard.of(shape.ffn, powers=self.r4_blocks, block=self.blocks) if self.r4 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json."""
        plain = asdict(self)
        for name in ("layers", "clips", "tied_head", "blocks"):  # which most runs have not
            if not plain[name]:
                del plain[name]
        for name in ("activation_convention", "cache_served_by"):
            if plain[name] == OWN:
                del plain[name]
        for name in ("type", "activation_type", "cache_format"):
            if plain[name] == "int":
                del plain[name]
        if not plain["activation_directions"]:
            del plain["activation_directions"]
        if plain["activation_dynamic"]:
            del plain["activation_dynamic"]
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Spec:
        """Read config.json's `quantization_config`.

        Raises:
            InputError: another format version, or fields that are missing, unknown or of no use.
        """
        data = {name: value for name, value in data.items() if name != "quant_method"}
        version = data.get("format_version")
        if version not in READABLE:
            raise InputError(
                f"this checkpoint has rotoboa format version {version}, and this installation reads {READABLE[0]} to "
                f"{READABLE[-1]}: install the release that wrote it, or quantize again."
            )
        unknown = sorted(set(data) - {field.name for field in fields(cls)})
        wrong = f"unknown {', '.join(unknown)}" if unknown else "no 'bits'" if "bits" not in data else ""
        if not wrong:
            try:
                layers = {name: QuantizationScheme.from_dict(one) for name, one in data.pop("layers", {}).items()}
            except (AttributeError, TypeError) as error:
                raise InputError(
                    f"the layers in the quantization_config of this checkpoint are damaged: {error}."
                ) from error
            spec = cls(**{**data, "layers": layers, "format_version": FORMAT_VERSION})
            wrong = without_meaning(spec)
        if wrong:
            raise InputError(f"the quantization_config of this checkpoint is damaged: {wrong}; export it again.")
        return spec
