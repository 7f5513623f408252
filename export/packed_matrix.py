"""Embedding and output layer in few bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..boa.scheme import QuantizationArgs
from ..boa.solver.rounding import Quantized
from .packing import unpacked


@dataclass(frozen=True)
class PackedMatrix:
    """Embedding or output layer in few bits, some rows at a time as floats; see `models.matrices.Matrix`.

    Attributes:
        stored: the tensors of a packed weight, a row a token, as `packing.packed_parts` has them.
        args: of its numbers.
        columns: of a row.
    """

    stored: Mapping[str, Tensor]
    args: QuantizationArgs
    columns: int

    @property
    def bits(self) -> int:
        """Of a number."""
        return self.args.num_bits

    @property
    def shape(self) -> torch.Size:
        """(rows, columns)."""
        return torch.Size((len(self.stored["qweight"]), self.columns))

    def quantized(self, index: slice | Tensor) -> Quantized:
        """The rows `index`, a slice or numbers (n,)."""
        return unpacked({name: part[index] for name, part in self.stored.items()}, self.args, self.columns)

    def __getitem__(self, index: slice | Tensor, /) -> Tensor:
        """The rows `index` in float32; those of token ids (..., columns) of any shape."""
        if isinstance(index, slice):
            return self.quantized(index).dequantize()
        return self.quantized(index.flatten()).dequantize().view(*index.shape, self.columns)

    def parts(self) -> dict[str, Tensor]:
        """The tensors that are stored."""
        return dict(self.stored)
