"""What runs online beside the linear layers of a quantized block: rotations and dynamic quantizers, by site."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ...models.families import ALL_SITES, Family
from ...rotation.hadamard import Hadamard
from .activations import DynamicQuantizer
from .attention import CACHE_SCALES, CENTER, AttentionTransform
from .directions import LeadingDirections
from .float8 import StaticFloat8

INPUT_FOUND = ("input_global_scale", "input_scale", "input_directions")
"""Of a projection: the tensor with what calibration has found of its input, the global scale in NVFP4 (1,), that of
static FP8 (1,), both by their names in compressed-tensors, or its directions (c, k)."""
FOUND = (CENTER, *CACHE_SCALES.values(), *INPUT_FOUND)
"""The last parts of the names of all tensors that calibration finds for quantizers."""

InputQuantizer = DynamicQuantizer | StaticFloat8 | LeadingDirections


@dataclass(frozen=True)
class InputTransform:
    """On its way into a linear layer, x (..., c) is rotated, then quantized; None leaves either out."""

    rotation: Hadamard | None = None
    quantizer: InputQuantizer | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's input as it computes with it."""
        x = self.rotate(x)
        return x if self.quantizer is None else self.quantizer(x)

    @property
    def scale_name(self) -> str | None:
        """Of `INPUT_FOUND`, what calibration finds for the quantizer; None: nothing."""
        found = None if self.quantizer is None else self.quantizer.found
        return None if found is None else f"input_{found}"

    def scaled(self, scale: Tensor | None) -> InputTransform:
        """The same with that scale; None leaves it as it is."""
        if self.quantizer is None or self.quantizer.found is None or scale is None:
            return self
        return replace(self, quantizer=replace(self.quantizer, **{self.quantizer.found: scale}))  # type: ignore[arg-type]

    def make_room(self, module: nn.Module, holder: nn.Module | None = None) -> None:
        """Let a projection hold that scale, where there is one; before it is loaded, it is what the quantizer has.

        Directions, which are many numbers, are held by the first projection of their input alone, the `holder`.
        """
        if self.quantizer is None or self.quantizer.found is None:
            return
        if not isinstance(self.quantizer, LeadingDirections):
            plain = getattr(self.quantizer, self.quantizer.found)
            module.register_buffer(f"input_{self.quantizer.found}", torch.full((1,), float(plain)))
        elif holder is None or holder is module:
            module.register_buffer(f"input_{self.quantizer.found}", self.quantizer.room())
        else:
            module.input_holder = (holder,)  # type: ignore[assignment]  # in a tuple: it is no part of this module

    def of(self, module: nn.Module) -> InputTransform:
        """The same with the scale that a projection holds, or another for it."""
        if self.scale_name is None:
            return self
        (holder,) = getattr(module, "input_holder", (module,))
        return self.scaled(getattr(holder, self.scale_name, None))

    def rotate(self, x: Tensor) -> Tensor:
        """The exact part only, as the full-precision stream has it."""
        return x if self.rotation is None else self.rotation.apply(x)


@dataclass(frozen=True)
class OnlineTransforms:
    """One decoder block's sites: `qkv`, `output`, `gate_up`, `down` and `latent` are inputs of linear layers.

    The `down` of an expert that all tokens go to may be of another width: it has a rotation of its own.
    """

    qkv: InputTransform = InputTransform()
    output: InputTransform = InputTransform()
    gate_up: InputTransform = InputTransform()
    down: InputTransform = InputTransform()
    attention: AttentionTransform = field(default_factory=AttentionTransform)
    shared_rotation: Hadamard | None = None
    latent: InputTransform = InputTransform()

    @property
    def shared_down(self) -> InputTransform:
        """Of the expert that all tokens go to."""
        return replace(self.down, rotation=self.shared_rotation)

    def by_projection(self, family: Family) -> dict[str, InputTransform]:
        """The transform of each projection's input."""
        found = {name: getattr(self, site) for name, site in family.sites.items()}
        return found | {family.shared_down: self.shared_down} if family.shared else found

    @property
    def without_quantizers(self) -> OnlineTransforms:
        """The rotations alone."""
        exact = self
        for site in ALL_SITES:
            exact = exact.with_input(site, InputTransform(getattr(self, site).rotation))
        return replace(exact, attention=AttentionTransform(self.attention.rotation))

    def scales(self, family: Family) -> dict[str, Tensor]:
        """What calibration has found, or the quantizers have without, by the names of tensors inside a block.

        Scales are (1,), directions (c, k).
        """
        found: dict[str, Tensor | float] = {}
        directions = {}
        for name, transform in self.by_projection(family).items():
            quantizer, key = transform.quantizer, f"{name}.{transform.scale_name}"
            if isinstance(quantizer, LeadingDirections):
                if holder(family, name) == name:
                    directions[key] = quantizer.directions
            elif quantizer is not None and quantizer.found is not None:
                found[key] = getattr(quantizer, quantizer.found)
        for part, name in self.attention.scale_names.items():
            found[f"{family.attention}.{name}"] = getattr(self.attention, part).scale
        # Each a tensor of its own, though layers have one in common: files of safetensors hold no shared memory.
        scales = {name: torch.as_tensor(scale).reshape(1).clone() for name, scale in found.items()}
        return scales | directions

    def with_input(self, site: str, transform: InputTransform) -> OnlineTransforms:
        """The same but for the input of one site."""
        return replace(self, **{site: transform})  # type: ignore[arg-type]


def holder(family: Family, name: str) -> str:
    """The first projection that reads the input of projection `name`."""
    site = family.sites.get(name)
    return next((other for other, its in family.sites.items() if its == site), name)
