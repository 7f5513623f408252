"""How the numbers of one layer are stored, in the words of compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

FULL = 16
"""Bits of a number that is left as it is."""
GROUPS = {"nvfp4": 16, "mxfp4": 32}
"""The group sizes of the formats of four-bit floating point: see `stored_scales`."""
FLOATS: dict[str, tuple[int, int | None]] = {**{name: (4, size) for name, size in GROUPS.items()}, "fp8": (8, None)}
"""Bits and group of each format of floating point, by which they are told apart."""


@dataclass(frozen=True)
class QuantizationArgs:
    """Of a layer's weights, or of its inputs.

    Attributes:
        num_bits: 2 to 8; 16 is no quantization.
        group_size: channels that share a scale; None: all of an output channel, or of a token.
        symmetric: there is no zero point, or it is fixed at the middle of the grid.
        type: of the numbers: int, or float, of bits and groups of `FLOATS` and symmetric.
    """

    num_bits: int = FULL
    group_size: int | None = None
    symmetric: bool = False
    type: str = "int"

    @property
    def quantizes(self) -> bool:
        """Whether anything is rounded."""
        return self.num_bits < FULL

    @classmethod
    def of(cls, name: str, num_bits: int, group_size: int | None, symmetric: bool) -> QuantizationArgs:
        """In the format `name`: int, or one of `FLOATS`, which has bits, group and symmetry of its own."""
        if name == "int" or num_bits == FULL:
            return cls(num_bits, group_size, symmetric)
        return cls(*FLOATS[name], True, "float")

    @property
    def format(self) -> str:
        """The name of the format of the numbers: int, nvfp4, mxfp4 or fp8."""
        if self.type == "int" or not self.quantizes:
            return "int"
        return next(name for name, own in FLOATS.items() if own == (self.num_bits, self.group_size))

    def wrong(self) -> str:
        """What has no meaning, in words; empty where all has."""
        legal = {
            "num_bits": self.num_bits in (*range(2, 9), FULL),
            "group_size": self.group_size is None or (type(self.group_size) is int and self.group_size > 0),
            "symmetric": isinstance(self.symmetric, bool),
            "type": self.type == "int"
            or (self.type == "float" and self.symmetric and (self.num_bits, self.group_size) in FLOATS.values()),
        }
        return next((f"{name} is {getattr(self, name)!r}" for name, is_legal in legal.items() if not is_legal), "")


@dataclass(frozen=True)
class QuantizationScheme:
    """Of one layer."""

    weights: QuantizationArgs = QuantizationArgs()
    input_activations: QuantizationArgs = QuantizationArgs()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, Any]]) -> QuantizationScheme:
        """The inverse.

        Raises:
            TypeError: a field is unknown.
        """
        return cls(**{name: QuantizationArgs(**part) for name, part in data.items()})

    @property
    def shown(self) -> str:
        """Such as W4A16, with the group of the weights where there is one."""
        group = f" g{self.weights.group_size}" if self.weights.group_size and self.weights.quantizes else ""
        if self.weights.format != "int":
            group = f" {self.weights.format}"
        return f"W{self.weights.num_bits}A{self.input_activations.num_bits}{group}"
