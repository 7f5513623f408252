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
SUPER = 256
"""Weights of a row that share the scales of scales, in the formats of `TWO_LEVELS`."""
TWO_LEVELS = {
    "q2_k": (2, 16, False), "q3_k": (3, 16, True), "q4_k": (4, 32, False), "q5_k": (5, 32, False),
    "q6_k": (6, 16, True),
}  # fmt: skip
"""Bits, groups and symmetry of integers whose scales have scales: see `super_scales`."""


@dataclass(frozen=True)
class QuantizationArgs:
    """Of a layer's weights, or of its inputs.

    Attributes:
        num_bits: 2 to 8; 16 is no quantization.
        group_size: channels that share a scale; None: all of an output channel, or of a token.
        symmetric: there is no zero point, or it is fixed at the middle of the grid.
        type: of the numbers: int, or float, of bits and groups of `FLOATS` and symmetric; or k: integers as of
            `TWO_LEVELS`.
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
        return cls(*TWO_LEVELS[name], "k") if name in TWO_LEVELS else cls(*FLOATS[name], True, "float")

    @property
    def in_words(self) -> str:
        """What the format of the numbers says by itself, of `format` other than int."""
        if self.type == "k":
            point = "no zero point" if self.symmetric else "a zero point"
            return f"{self.num_bits} bits, groups of {self.group_size} in {SUPER} and {point}"
        groups = f"groups of {self.group_size}" if self.group_size else "no groups"
        return f"{self.num_bits} bits, {groups} and no zero point"

    @property
    def unit(self) -> int:
        """Weights of a row that are stored together: a width is a multiple of it."""
        return SUPER if self.type == "k" else self.group_size or 1

    @property
    def format(self) -> str:
        """The name of the format of the numbers: int, one of `FLOATS`, or one of `TWO_LEVELS`."""
        if self.type == "int" or not self.quantizes:
            return "int"
        if self.type == "k":
            return next(name for name, (bits, _, _) in TWO_LEVELS.items() if bits == self.num_bits)
        return next(name for name, own in FLOATS.items() if own == (self.num_bits, self.group_size))

    def wrong(self) -> str:
        """What has no meaning, in words; empty where all has."""
        legal = {
            "num_bits": self.num_bits in (*range(2, 9), FULL),
            "group_size": self.group_size is None or (type(self.group_size) is int and self.group_size > 0),
            "symmetric": isinstance(self.symmetric, bool),
            "type": self.type == "int"
            or (self.type == "k" and (self.num_bits, self.group_size, self.symmetric) in TWO_LEVELS.values())
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
