"""Statistics summed over the batches of all ranks.

A sum of floating-point numbers depends on its order. Each batch is summed by itself, in the dtype of the computation,
and batches in float64: their order then shows only beyond float32, and any number of ranks that have whole batches
finds the same sums, but for the rare one that lies between two float32 numbers. A deterministic total is the same for
certain: it is a binary tree over the batches of all sequences. Node i of level k is the sum of batches i 2^k to
(i + 1) 2^k - 1, of which a rank works out those that lie in its share whole. However the batches are shared out, the
same numbers are added in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..ranks import Ranks


class Statistics(Protocol):
    """Sums over batches."""

    def sums(self) -> dict[str, list[Tensor]]:
        """Parts, as views, of each tensor that there is, by the name of its attribute, alike on every rank."""
        ...


S = TypeVar("S", bound=Statistics)
T = TypeVar("T")
Node = tuple[int, int]  # level, index


class Total(Generic[S]):
    """One kind of statistics over all batches of all ranks.

    Args:
        make: makes empty statistics.
        ranks: that sum.
        batches: the numbers of each rank's batches; the first has some.
    """

    def __init__(self, make: Callable[[], S], ranks: Ranks, batches: Sequence[range]) -> None:
        self._make, self._ranks, self._batches = make, ranks, batches
        self._stack: list[tuple[int, int, S]] = []  # of the tree
        self._wide: list[Tensor] = []
        self._open: tuple[int, S] | None = None
        self._wait: Callable[[], None] | None = None
        self._value: S | None = None

    def at(self, batch: int) -> S:
        """The statistics that a batch, by its number among those of all ranks, is to be added to, in order."""
        if self._open is None or self._open[0] != batch:
            self._close()
            self._open = (batch, self._make())
        return self._open[1]

    def _close(self) -> None:
        """A batch is whole."""
        if self._open is None:
            return
        batch, statistics = self._open
        if self._ranks.deterministic:
            push(self._stack, 0, batch, statistics, _merge)
        elif self._wide:
            for total, part in zip(self._wide, _parts(statistics), strict=True):
                total += part
        else:
            self._wide = [part.to(torch.float64, copy=True) for part in _parts(statistics)]
        self._open, self._value = None, statistics

    def start(self) -> None:
        """Begin to sum over ranks: nothing is added any more. `value` waits for it."""
        if self._wait is not None:
            return
        self._close()
        self._fill()
        if self._ranks.deterministic:
            self._value, self._wait = self._tree(), lambda: None
        else:
            self._wait = self._ranks.sum(self._wide)

    def value(self) -> S:
        """The sums over all ranks."""
        self.start()
        if self._value is None or self._wait is None:
            raise ValueError("no calibration tokens were seen")
        self._wait()
        self._wait = lambda: None
        for total, part in zip(self._wide, _parts(self._value), strict=False):
            part.copy_(total)
        self._wide = []
        return self._value

    def _fill(self) -> None:
        """On a rank without a batch: zeros, of the shapes that the first rank has."""
        if all(self._batches):
            return
        first = self._value if self._ranks.rank == 0 else None
        shapes = self._ranks.broadcast_value(None if first is None else _form(first))
        if self._value is None:
            self._value = _empty(self._make(), shapes)
            self._wide = [part.to(torch.float64, copy=True) for part in _parts(self._value)]

    def _tree(self) -> S:
        """Every rank's nodes, one after another, and what they are the branches of."""
        if self._ranks.size == 1 or self._value is None:
            return fold(self._stack, _merge)
        mine, form = iter(self._stack), _form(self._value)

        def nodes() -> Iterable[tuple[int, int, S]]:
            for rank, batches in enumerate(self._batches):
                for level, index in dyadic(batches):
                    node = next(mine)[2] if rank == self._ranks.rank else _empty(self._make(), form)
                    self._ranks.broadcast(_parts(node), rank)
                    yield level, index, node

        return fold(nodes(), _merge)


def dyadic(batches: range) -> list[Node]:
    """The fewest nodes of the tree that cover a range of batches, in order."""
    stack: list[tuple[int, int, None]] = []
    for batch in batches:
        push(stack, 0, batch, None, lambda a, b: None)
    return [(level, index) for level, index, _ in stack]


def push(stack: list[tuple[int, int, T]], level: int, index: int, value: T, add: Callable[[T, T], T]) -> None:
    """Put a node on a stack of those before it, and branches in the place of what they consist of."""
    while stack and index % 2 and stack[-1][:2] == (level, index - 1):
        value, level, index = add(stack.pop()[2], value), level + 1, index // 2
    stack.append((level, index, value))


def fold(nodes: Iterable[tuple[int, int, T]], add: Callable[[T, T], T]) -> T:
    """The root of the tree of all nodes, in order; where a branch is missing, its sibling stands for both."""
    stack: list[tuple[int, int, T]] = []
    for level, index, value in nodes:
        push(stack, level, index, value, add)
    if not stack:
        raise ValueError("no calibration tokens were seen")
    total = stack.pop()[2]
    while stack:
        total = add(stack.pop()[2], total)
    return total


def _parts(statistics: S) -> list[Tensor]:
    return [part for parts in statistics.sums().values() for part in parts]


def _merge(left: S, right: S) -> S:
    for a, b in zip(_parts(left), _parts(right), strict=True):
        a += b
    return left


def _form(statistics: S) -> dict[str, tuple[list[int], str, str]]:
    """Shape, dtype and device type of each tensor of statistics, by its name."""
    tensors = {name: getattr(statistics, name) for name in statistics.sums()}
    return {name: (list(t.shape), str(t.dtype).removeprefix("torch."), t.device.type) for name, t in tensors.items()}


def _empty(statistics: S, form: dict[str, tuple[list[int], str, str]]) -> S:
    """Statistics of nothing, of this form."""
    for name, (shape, dtype, device) in form.items():
        setattr(statistics, name, torch.zeros(shape, dtype=getattr(torch, dtype), device=device))
    return statistics
