"""Sums over batches: in any order the same, and as one tree however the batches are shared out."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rotoboa.boa.objective.totals import Total, dyadic, fold
from rotoboa.boa.ranks import Ranks


@dataclass
class Sum:
    total: Tensor | None = None

    def add(self, x: Tensor) -> None:
        self.total = x.clone() if self.total is None else self.total + x

    def sums(self) -> dict[str, list[Tensor]]:
        return {} if self.total is None else {"total": list(self.total)}


def numbers(batches: int) -> Tensor:
    draw = torch.Generator().manual_seed(batches)
    return torch.randn(batches, 3, 50, generator=draw) * 10 ** torch.randint(-4, 5, (batches, 3, 50), generator=draw)


def written_out(start: int, stop: int, batches: int) -> str:
    """The tree over batches, as a bracketed sum; node by node, from its definition."""
    if start >= batches:
        return ""
    if stop - start == 1:
        return str(start)
    middle = (start + stop) // 2
    parts = [part for part in (written_out(start, middle, batches), written_out(middle, stop, batches)) if part]
    return f"({'+'.join(parts)})" if len(parts) == 2 else parts[0]


@pytest.mark.parametrize("batches", [1, 2, 3, 5, 6, 8, 13])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_tree_is_the_same_however_batches_are_shared(batches: int, ranks: int) -> None:
    nodes: list[tuple[int, int, str]] = []
    for rank in range(ranks):
        own = range(rank * batches // ranks, (rank + 1) * batches // ranks)
        for level, index in dyadic(own):
            first, last = index << level, (index + 1) << level
            assert first >= own.start and last <= own.stop
            nodes.append((level, index, written_out(first, last, batches)))
    found = fold(nodes, lambda a, b: f"({a}+{b})")
    assert found == written_out(0, 1 << max(batches - 1, 0).bit_length(), batches)


@pytest.mark.parametrize("batches", [1, 3, 6])
def test_totals(batches: int) -> None:
    x = numbers(batches)
    total, fixed = (Total(Sum, Ranks(deterministic), [range(batches)]) for deterministic in (False, True))
    for batch, part in enumerate(x):
        for half in (part[None, :2], part[None, 2:]):  # what a batch adds in two parts is one number of the sum
            rows = slice(0, 2) if half.shape[1] == 2 else slice(2, 3)
            whole = torch.zeros(3, 50)
            whole[rows] = half[0]
            total.at(batch).add(whole)
            fixed.at(batch).add(whole)
    wide, exact = total.value().total, x.double().sum(0)
    assert wide is not None and torch.equal(wide, exact.float())
    assert total.value().total is wide
    tree = fold(((0, batch, part) for batch, part in enumerate(x)), torch.add)
    found = fixed.value().total
    assert found is not None and torch.equal(found, tree)


def test_nothing_was_seen() -> None:
    with pytest.raises(ValueError, match="no calibration tokens were seen"):
        Total(Sum, Ranks(), [range(1)]).value()


def test_shares_are_whole_batches_where_there_are_enough() -> None:
    class Some(Ranks):
        size = 3

    assert Some().shares(20, 4) == [range(0, 4), range(4, 12), range(12, 20)]
    assert Some().shares(7, 4) == [range(0, 2), range(2, 4), range(4, 7)]
    assert Some(deterministic=True).shares(7, 4) == [range(0, 0), range(0, 4), range(4, 7)]
    for count in range(3, 40):
        shares = Some().shares(count, 4)
        assert [i for share in shares for i in share] == list(range(count)) and all(shares)
