"""The mean of keys, without which they are rounded."""

from __future__ import annotations

from torch import Tensor


class KeyMean:
    """The mean of a block's keys over all tokens, by head."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count: Tensor | None = None

    def add(self, key: Tensor) -> None:
        """One batch, (batch, key heads, length, head_dim)."""
        self.total = key.sum((0, 2)) + (0 if self.total is None else self.total)
        self.count = key.new_tensor([key.shape[0] * key.shape[2]]) + (0 if self.count is None else self.count)

    def sums(self) -> dict[str, list[Tensor]]:
        """As `totals.Statistics` has it."""
        return {name: [part] for name in ("total", "count") if (part := getattr(self, name)) is not None}

    @property
    def mean(self) -> Tensor:
        """(key heads, head_dim)."""
        if self.total is None or self.count is None:
            raise ValueError("no calibration tokens were seen")
        return self.total / self.count
