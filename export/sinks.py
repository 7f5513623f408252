"""The first positions of each sequence in a packed cache, kept as they came; padding on the left is none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Sinks:
    """Keys and values of the `count` first positions of each sequence, (batch, heads, count, size).

    Args:
        count: how many.
        key, value: states of a sequence, for their sizes.
    """

    def __init__(self, count: int, key: Tensor, value: Tensor) -> None:
        shapes = ((*part.shape[:2], count, part.shape[3]) for part in (key, value))
        self.keys, self.values = (key.new_zeros(shape) for shape in shapes)
        self.starts = torch.zeros(len(key), dtype=torch.long, device=key.device)

    def start(self, starts: Tensor | None) -> None:
        """Say where sequences begin, (batch or 1,) positions; None changes nothing."""
        if starts is not None:
            self.starts = starts.to(self.keys.device).expand(len(self.keys))

    def keep(self, key: Tensor, value: Tensor, before: int) -> None:
        """Take from states (batch, heads, new, size), of which the first is at position `before`."""
        rows, index, which = self._where(before, key.shape[2])
        for mine, new in ((self.keys, key), (self.values, value)):
            mine[rows, :, which] = new[rows, :, index]

    def restore(self, key: Tensor, value: Tensor, before: int) -> None:
        """Put them back into such states, in place."""
        rows, index, which = self._where(before, key.shape[2])
        for mine, read in ((self.keys, key), (self.values, value)):
            read[rows, :, index] = mine[rows, :, which]

    def _where(self, before: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of those within `length` positions from `before` on: the sequence, the index there, and which it is."""
        index = self.starts[:, None] - before + torch.arange(self.keys.shape[2], device=self.starts.device)
        rows, which = ((index >= 0) & (index < length)).nonzero(as_tuple=True)
        return rows, index[rows, which], which

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Choose, repeat or move sequences."""
        self.keys, self.values, self.starts = change(self.keys), change(self.values), change(self.starts)


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
