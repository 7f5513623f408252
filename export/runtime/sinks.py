"""The first positions of each sequence in a packed cache, kept as they came; padding on the left is none of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Sinks:
    """Keys and values of the `count` first positions of each sequence, (batch, heads, count, size).

    Args:
        count: how many.
        parts: states of keys and of values, for their sizes; those that are not quantized are exact already.
        quantized: whether keys are, and values.
    """

    def __init__(self, count: int, parts: Sequence[Tensor], quantized: Sequence[bool]) -> None:
        self.count = count
        self.kept: list[Tensor | None] = [
            part.new_zeros(*part.shape[:2], count, part.shape[3]) if wanted else None
            for part, wanted in zip(parts, quantized, strict=True)
        ]
        self.starts = torch.zeros(len(parts[0]), dtype=torch.long, device=parts[0].device)

    def start(self, starts: Tensor | None) -> None:
        """Say where sequences begin, (batch or 1,) positions; None changes nothing."""
        if starts is not None:
            self.starts = starts.to(self.starts.device).expand(len(self.starts))

    def keep(self, parts: Sequence[Tensor], before: int) -> None:
        """Take from keys and values (batch, heads, new, size), of which the first are at position `before`."""
        rows, index, which = self._where(before, parts[0].shape[2])
        for mine, new in zip(self.kept, parts, strict=True):
            if mine is not None:
                mine[rows, :, which] = new[rows, :, index]

    def restore(self, parts: Sequence[Tensor], before: int) -> None:
        """Put them back into such keys and values, in place."""
        rows, index, which = self._where(before, parts[0].shape[2])
        for mine, read in zip(self.kept, parts, strict=True):
            if mine is not None:
                read[rows, :, index] = mine[rows, :, which]

    @property
    def bytes(self) -> int:
        """What they take."""
        return sum(part.numel() * part.element_size() for part in self.kept if part is not None)

    def _where(self, before: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of those within `length` positions from `before` on: the sequence, the index there, and which it is."""
        index = self.starts[:, None] - before + torch.arange(self.count, device=self.starts.device)
        rows, which = ((index >= 0) & (index < length)).nonzero(as_tuple=True)
        return rows, index[rows, which], which

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Choose, repeat or move sequences."""
        self.kept = [None if part is None else change(part) for part in self.kept]
        self.starts = change(self.starts)


def first_positions(mask: Any) -> Tensor | None:
    """How many positions of each sequence are padding on the left, (batch or 1,), as an attention mask says.

    Args:
        mask: (batch, length) of 0 and 1, or (batch or 1, 1 or heads, length, key length) of booleans or of numbers to
            add; or such masks by kind of layer.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return None
    if mask.ndim == 4:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        mask = seen.flatten(1, 2).any(1)
    return (mask.cumsum(-1) == 0).sum(-1)
