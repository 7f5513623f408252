"""The processes that quantize one model together, each a rank with a share of the calibration sequences.

`Ranks` is the only one of a run without others: what it is asked to sum, tell or exchange is there already.
`pipeline.distributed` has those of torch.distributed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class Ranks:
    """One process that has all of the work.

    Args:
        deterministic: sum in an order, and compute in shapes, that do not depend on how many ranks there are.
    """

    rank = 0
    size = 1

    def __init__(self, deterministic: bool = False) -> None:
        self.deterministic = deterministic

    def shares(self, count: int, batch: int) -> list[range]:
        """The sequences of each rank, of `count` in all: contiguous, and whole batches where there are enough.

        What a batch gives may depend in its last bits on what is in it. So whole ones give the same on any rank, and
        deterministic shares are nothing else.
        """
        batches = -(-count // batch)
        if self.deterministic or batches >= self.size:
            bounds = [min(r * batches // self.size * batch, count) for r in range(self.size + 1)]
        else:
            bounds = [r * count // self.size for r in range(self.size + 1)]
        return [range(bounds[r], bounds[r + 1]) for r in range(self.size)]

    def sum(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """Begin to sum tensors over ranks, in place; the function that is returned waits until that is done."""
        return lambda: None

    def broadcast(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Make tensors, of the same shapes on every rank, what they are on rank `source`, in place."""

    def exchange(self, parts: Sequence[Sequence[Tensor]]) -> None:
        """`broadcast` of `parts[r]` from rank r, for every r."""
        for source, tensors in enumerate(parts):
            self.broadcast(tensors, source)

    def broadcast_value(self, value: Any = None, source: int = 0) -> Any:
        """What rank `source` gave: anything that JSON can hold."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, by rank: anything that JSON can hold."""
        return [value]

    def tick(self) -> None:
        """Say that this rank is at work: others wait for it no longer than a timeout without this."""
