"""What a budget of bits was spent on, of a run's report, as the figures of `figures.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...models.families import SITES
from .charts import Chart, legend, log_scale, span
from .figures import PLACES, Picture

if TYPE_CHECKING:
    from ...pipeline.storage.manifest import BudgetEntry, UnitEntry

ACROSS = 16
"""Blocks side by side: more would be too narrow on a phone for a number in each."""
DEAREST = 10


def sentence(budget: BudgetEntry) -> str:
    """What there was room for, and what was taken."""
    cost = sum(unit.costs[unit.bits] for unit in budget.units)
    return (
        f"The budget left {budget.room:,} bytes for these layers, and they take {budget.taken:,} "
        f"({budget.taken / max(budget.room, 1):.1%}). What the choices cost adds up to {cost:.3g} nats."
    )


def range_of(budget: BudgetEntry) -> str:
    """The fewest and the most bits that were chosen, in words."""
    least, most = (choice(unit.bits for unit in budget.units) for choice in (min, max))
    return f"{least} bits" if least == most else f"{least} to {most} bits by a budget"


def bits_by_block(budget: BudgetEntry, count: int) -> Picture:
    """Cells: the bits of each site of `count` blocks, in lines of `ACROSS`."""
    chosen = {(unit.block, unit.site): unit.bits for unit in budget.units}
    blocks = range(max(count, *(block + 1 for block, _ in chosen)))
    across = min(ACROSS, len(blocks))
    lines = -(-len(blocks) // across)
    least, most = min(chosen.values()), max(chosen.values())
    with Chart(height=1.15, rows=lines) as chart:
        for line, axes in enumerate(chart.axes):
            own = blocks[line * across : (line + 1) * across]
            for row, site in enumerate(SITES):
                for block in own:
                    if (bits := chosen.get((block, site))) is not None:
                        strength = (bits - least) / max(most - least, 1)
                        title = f"block {block}, {PLACES[site]}: {bits} bits"
                        chart.cell(axes, block, row, str(bits), strength, title)
            axes.set_xlim(own[0] - 0.5, own[0] + across - 0.5)
            axes.set_ylim(len(SITES) - 0.5, -0.5)
            axes.set_xticks(list(own) if len(own) <= 8 else list(own[::2]))
            axes.set_yticks(range(len(SITES)), [PLACES[site] for site in SITES])
            axes.grid(False)
        chart.axes[-1].set_xlabel("block")
    missing = any((block, site) not in chosen for block in blocks for site in SITES)
    text = "Layers that read one input in one block share their bits; a stronger colour is more of them."
    text += " An empty cell has bits of its own by an override." if missing else ""
    title = "Bits of each site of each block"
    rows = [[str(block), *(str(chosen.get((block, site), "")) for site in SITES)] for block in blocks]
    return Picture(title, chart.svg(title), text, ["block", *(PLACES[site] for site in SITES)], rows)


def dearest_units(budget: BudgetEntry) -> Picture:
    """Points: the units that cost most at the bits that were chosen, and what a step fewer or more would cost."""
    units = sorted(budget.units, key=lambda unit: -unit.costs[unit.bits])[:DEAREST]
    names = [f"block {unit.block}, {PLACES[unit.site]}" for unit in units]
    steps = {"a step fewer": -1, "as chosen": 0, "a step more": 1}
    costs = [[_stepped(unit, step) for step in steps.values()] for unit in units]
    found = [(row, series, *cost) for row, own in enumerate(costs) for series, cost in enumerate(own) if cost]
    low, high = span([cost for *_, cost in found], 1.4)
    with Chart(height=0.8 + 0.24 * len(units)) as chart:
        axes = chart.axes[0]
        for series, label in enumerate(steps):
            own = [(row, bits, cost) for row, which, bits, cost in found if which == series and cost > 0]
            titles = [f"{names[row]}, {label}, {bits} bits: {cost:.3g} nats" for row, bits, cost in own]
            chart.line(axes, [cost for *_, cost in own], [row for row, *_ in own], label, series, titles, joined=False)
        axes.set_yticks(range(len(units)), names)
        axes.set_ylim(len(units) - 0.5, -0.5)
        log_scale(axes.xaxis, low, high)
        axes.set_xlabel("KL from full precision, nats")
        legend(chart, axes, 3)
    rows = [
        [name, str(unit.bits), *(f"{cost[1]:.3g} ({cost[0]} bits)" if cost else "" for cost in own)]
        for name, unit, own in zip(names, units, costs, strict=True)
    ]
    text = (
        f"The {len(units)} that cost most: how far the predictions move when this unit alone is rounded, on a little "
        "calibration text. Measured at one number of bits; at others it is taken to rise as the unit's own error does."
    )
    title = "The dearest units of the budget"
    return Picture(title, chart.svg(title), text, ["unit", "bits", *steps], rows)


def _stepped(unit: UnitEntry, step: int) -> tuple[int, float] | None:
    """Bits and cost so many choices further; None where there is none."""
    choices = sorted(unit.costs)
    at = choices.index(unit.bits) + step
    return (choices[at], unit.costs[choices[at]]) if 0 <= at < len(choices) else None
