"""The bits of each layer that a budget leaves room for, by what they cost the model."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ...errors import InputError
from ...export.finished import numbers_in_blocks, projection_columns, projection_rows
from ...export.packing import packed_bytes
from ...export.stored_sizes import projection_bytes, stored_bytes
from ...models.outer_layers import OuterLayers
from ..console.human import human_size
from ..console.progress import Progress
from ..job.job import Job
from ..recipe.layers import choice_args
from ..recipe.settings import stays_tied
from ..storage.manifest import BudgetEntry, UnitEntry
from .knapsack import cheapest
from .sensitivity import Unit, measure_units

HEADERS = 400  # bytes of a file's header for each tensor of the original, of which a packed one is three


def choose_bits(job: Job, tokens: Tensor, outer: OuterLayers, progress: Progress) -> BudgetEntry | None:
    """What the recipe's budget is spent on, the same on every rank; None where it has none. `outer` is rotated.

    Raises:
        InputError: there is no room for the fewest bits.
    """
    weights = job.recipe.weights
    if weights.budget is None and weights.size is None:
        return None
    found = None
    if job.ranks.rank == 0:
        with job.timed("sensitivity"):
            units = measure_units(job, tokens, outer, partial(_free, job), choice_args(job.recipe), progress)
        found = _chosen(job, units).model_dump(mode="json")
    return BudgetEntry.model_validate(job.ranks.broadcast_value(found))


def _free(job: Job, index: int, name: str) -> bool:
    """Whether no override says what becomes of a layer's weights."""
    scheme = job.spec.layers.get(f"{job.decoder.family.layers}.{index}.{name}")
    return scheme is None or scheme.weights == job.spec.scheme.weights


def _chosen(job: Job, units: list[Unit]) -> BudgetEntry:
    family, weights = job.decoder.family, job.recipe.weights
    itemsize = job.checkpoint.dtype.itemsize
    taken = projection_bytes(job.decoder, job.spec, itemsize)
    free = {f"{family.layers}.{unit.block}.{name}" for unit in units for name in unit.layers}
    numbers, shape = numbers_in_blocks(family, job.decoder.shape), job.decoder.shape
    if weights.size is not None:
        tied = stays_tied(job.recipe, job.rotations, job.decoder)
        whole = sum(stored_bytes(job.decoder, job.spec, itemsize, tied=tied).values())
        room = int(weights.size) - (whole - sum(taken.values())) - HEADERS * len(job.decoder.shapes)
    else:
        assert weights.budget is not None
        room = int(weights.budget * numbers / 8)
    room -= sum(size for name, size in taken.items() if name not in free)

    choices = choice_args(job.recipe)

    def size(unit: Unit, bits: int) -> int:
        rows, columns = projection_rows(family, shape, unit.block), projection_columns(family, shape, unit.block)
        return sum(packed_bytes(rows[name], columns[name], choices[bits], itemsize) for name in unit.layers)

    sizes = [[size(unit, bits) for bits in unit.costs] for unit in units]
    chosen = cheapest([list(unit.costs.values()) for unit in units], sizes, room)
    if chosen is None:
        least = sum(map(min, sizes))
        field = "weights.size" if weights.size is not None else "weights.budget"
        raise InputError(
            f"{field} leaves {human_size(max(room, 0))} for layers that take {human_size(least)} in "
            f"{min(choices)} bits: give more, fewer bits in --weights.choices, or larger groups."
        )
    entries = [
        UnitEntry(block=unit.block, site=unit.site, layers=unit.layers, bits=list(unit.costs)[i], costs=unit.costs)
        for unit, i in zip(units, chosen, strict=True)
    ]
    return BudgetEntry(units=tuple(entries), room=room, taken=sum(own[i] for own, i in zip(sizes, chosen, strict=True)))
