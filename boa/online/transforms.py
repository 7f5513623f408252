"""What runs online beside the linear layers of a quantized block: rotations and dynamic quantizers, by site."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ...models.families import ALL_SITES, Family
from ...rotation.hadamard import Hadamard
from .activations import DynamicQuantizer
from .attention import CACHE_SCALES, CENTER, AttentionTransform
from .float8 import StaticFloat8

INPUT_SCALES = ("input_global_scale", "input_scale")
"""Of a projection: the tensor (1,) with what calibration has found of its input, the global scale in NVFP4, or that of
static FP8; the names are those of compressed-tensors."""
FOUND = (CENTER, *CACHE_SCALES.values(), *INPUT_SCALES)
"""The last parts of the names of all tensors that calibration finds for quantizers."""


@dataclass(frozen=True)
class InputTransform:
    """On its way into a linear layer, x (..., c) is rotated, then quantized; None leaves either out."""

    rotation: Hadamard | None = None
    quantizer: DynamicQuantizer | StaticFloat8 | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's input as it computes with it."""
        x = self.rotate(x)
        return x if self.quantizer is None else self.quantizer(x)

    @property
    def scale_name(self) -> str | None:
        """Of `INPUT_SCALES`, what calibration finds for the quantizer; None: nothing."""
        found = None if self.quantizer is None else self.quantizer.found
        return None if found is None else f"input_{found}"

    def scaled(self, scale: Tensor | None) -> InputTransform:
        """The same with that scale; None leaves it as it is."""
        if self.quantizer is None or self.quantizer.found is None or scale is None:
            return self
        return replace(self, quantizer=replace(self.quantizer, **{self.quantizer.found: scale}))  # type: ignore[arg-type]

    def make_room(self, module: nn.Module) -> None:
        """Let a projection hold that scale, where there is one; before it is loaded, it is what the quantizer has."""
        if self.quantizer is not None and self.quantizer.found is not None:
            plain = getattr(self.quantizer, self.quantizer.found)
            module.register_buffer(f"input_{self.quantizer.found}", torch.full((1,), float(plain)))

    def of(self, module: nn.Module) -> InputTransform:
        """The same with the scale that a projection holds."""
        return self if self.scale_name is None else self.scaled(getattr(module, self.scale_name, None))

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
        """What calibration has found, or the quantizers have without, (1,), by the names of tensors inside a block."""
        found: dict[str, Tensor | float] = {}
        for name, transform in self.by_projection(family).items():
            if transform.quantizer is not None and transform.quantizer.found is not None:
                found[f"{name}.{transform.scale_name}"] = getattr(transform.quantizer, transform.quantizer.found)
        for part, name in self.attention.scale_names.items():
            found[f"{family.attention}.{name}"] = getattr(self.attention, part).scale
        # Each a tensor of its own, though layers have one in common: files of safetensors hold no shared memory.
        return {name: torch.as_tensor(scale).reshape(1).clone() for name, scale in found.items()}

    def with_input(self, site: str, transform: InputTransform) -> OnlineTransforms:
        """The same but for the input of one site."""
        return replace(self, **{site: transform})  # type: ignore[arg-type]
