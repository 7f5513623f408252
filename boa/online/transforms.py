"""What runs online beside the linear layers of a quantized block: rotations and dynamic quantizers, by site."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from ...models.families import ALL_SITES, Family
from ...rotation.hadamard import Hadamard
from .activations import DynamicQuantizer
from .attention import AttentionTransform

INPUT_SCALE = "input_global_scale"
"""Of a projection: the tensor (1,) with the global scale of its input in NVFP4."""


@dataclass(frozen=True)
class InputTransform:
    """On its way into a linear layer, x (..., c) is rotated, then quantized; None leaves either out."""

    rotation: Hadamard | None = None
    quantizer: DynamicQuantizer | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's input as it computes with it."""
        x = self.rotate(x)
        return x if self.quantizer is None else self.quantizer(x)

    @property
    def needs_scale(self) -> bool:
        """Whether the quantizer is NVFP4, whose scales are relative to one that calibration finds."""
        return self.quantizer is not None and self.quantizer.format == "nvfp4"

    def scaled(self, global_scale: Tensor | None) -> InputTransform:
        """The same with that scale; None leaves it as it is."""
        if self.quantizer is None or global_scale is None:
            return self
        return replace(self, quantizer=replace(self.quantizer, global_scale=global_scale))

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

    def with_input(self, site: str, transform: InputTransform) -> OnlineTransforms:
        """The same but for the input of one site."""
        return replace(self, **{site: transform})  # type: ignore[arg-type]
