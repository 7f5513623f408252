"""Embedding and output layer, the largest tensors of a model, some rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import InputError, RunError

SPAN = 2**24  # elements of the rows that are taken at a time


class Matrix(Protocol):
    """Rows to be had by a slice or by their numbers: a tensor, or a `StoredMatrix`."""

    @property
    def shape(self) -> torch.Size:
        """(rows, columns)."""

    def __getitem__(self, index: slice | Tensor, /) -> Tensor:
        """The rows `index`."""


@runtime_checkable
class PartedMatrix(Matrix, Protocol):
    """A matrix that a checkpoint holds as several tensors, packed."""

    def parts(self) -> dict[str, Tensor]:
        """These by the last parts of their names."""


@dataclass(frozen=True)
class ProductMatrix:
    """The rows of a matrix times another one, (columns, columns), in the dtype of that."""

    rows: Matrix
    right: Tensor

    @property
    def shape(self) -> torch.Size:
        """(rows, columns)."""
        return self.rows.shape

    def __getitem__(self, index: slice | Tensor, /) -> Tensor:
        """The rows `index`."""
        return (self.rows[index].float() @ self.right.float()).to(self.right.dtype)


@dataclass(frozen=True)
class NormedMatrix:
    """The rows of a matrix behind a LayerNorm of their own, in the matrix's dtype.

    Attributes:
        rows: the matrix.
        weight, bias: of the norm, (columns,).
        epsilon: what it adds to the variance.
    """

    rows: Matrix
    weight: Tensor
    bias: Tensor
    epsilon: float

    @property
    def shape(self) -> torch.Size:
        """(rows, columns)."""
        return self.rows.shape

    def __getitem__(self, index: slice | Tensor, /) -> Tensor:
        """The rows `index`."""
        rows = self.rows[index]
        weight, bias = self.weight.double(), self.bias.double()
        return nn.functional.layer_norm(rows.double(), weight.shape, weight, bias, self.epsilon).to(rows.dtype)


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix in a safetensors file; nothing of it is held.

    Indexing maps the file anew and reads what is asked for. The mapping, and with it what the system has read in, goes
    with the tensor that indexing returns: at once where `index` holds row numbers, since those rows are copied.

    Attributes:
        file: the file.
        stored: the tensor's name in it.
        shape: (rows, columns).
        name: what messages call it.
        advice: what they tell to do about a damaged file.
    """

    file: Path
    stored: str
    shape: torch.Size
    name: str
    advice: str = "download it again"

    def __getitem__(self, index: slice | Tensor, /) -> Tensor:
        """The rows `index`, as stored, on the CPU.

        Raises:
            InputError: the file is damaged.
            RunError: the rows hold NaN or Inf.
        """
        try:
            with safe_open(self.file, framework="pt") as reader:
                rows: Tensor = reader.get_tensor(self.stored)[index]
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.file}: tensor {self.name} cannot be read ({error}): {self.advice}.") from error
        check_finite(self.file, self.name, rows)
        return rows


def spans(matrix: Matrix, elements: int = SPAN) -> list[slice]:
    """All rows of a matrix in parts of no more than `elements`, and of one row at least."""
    rows, columns = matrix.shape
    count = max(1, elements // columns)
    return [slice(start, min(start + count, rows)) for start in range(0, rows, count)]


def check_finite(file: Path, name: str, tensor: Tensor) -> None:
    """Find NaN and Inf.

    Raises:
        RunError: there are some; file and tensor are named.
    """
    if not torch.stack(tensor.aminmax()).isfinite().all():  # isfinite of all of it takes 40 times as long
        raise RunError(f"{file}: tensor {name} holds NaN or Inf: download it again, or look for a sound checkpoint.")


def check_slice(what: str, found: Any, expected: torch.Size, packed: str = "") -> None:
    """Check shape and dtype of a stored tensor, of which `found` is safetensors' slice; `what` names it in errors.

    `packed` is the dtype of what does not hold the numbers themselves.

    Raises:
        InputError: it has another shape, or its numbers are no floating-point ones.
    """
    shape, dtype = tuple(found.get_shape()), found.get_dtype()
    if shape != tuple(expected):
        raise InputError(
            f"{what} has shape {shape}, and config.json asks for {tuple(expected)}: they do not belong together."
        )
    if dtype not in ((packed,) if packed else ("F16", "BF16", "F32", "F64")):
        raise InputError(f"{what} is stored as {dtype}: give the full-precision checkpoint.")
