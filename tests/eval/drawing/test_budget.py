"""What the page of a run says of its budget: each cell, the dearest units, and room and bytes taken."""

import copy
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from rotoboa.eval.drawing import budget as drawing
from rotoboa.eval.drawing.charts import SVG
from rotoboa.eval.drawing.report import page
from rotoboa.models.families import SITES
from rotoboa.pipeline.storage.manifest import BudgetEntry, UnitEntry

from .test_report import REPORT, contents

CHOICES = (2, 3, 4, 8)


def made(blocks: int, without: frozenset[tuple[int, str]] = frozenset()) -> BudgetEntry:
    """Bits and costs at random; of some units nothing was chosen."""
    draw = np.random.default_rng(blocks)
    units = []
    for block in range(blocks):
        for site in SITES:
            costs = {bits: float(draw.uniform(0.5, 1) * 4.0**-bits) for bits in CHOICES}
            bits = int(draw.choice(CHOICES))
            if (block, site) not in without:
                units.append(UnitEntry(block=block, site=site, layers=(site,), bits=bits, costs=costs))
    return BudgetEntry(units=tuple(units), room=2_000_000, taken=1_990_000)


def cells(svg: str) -> dict[tuple[int, str], int]:
    """Bits by block and site, of the number that is read in each cell: a cell is a path with a title, and where it
    stands is told by its corners, not by its title."""
    root = ElementTree.fromstring(svg)
    boxes, found = [], {}
    for group in root.iter(f"{{{SVG}}}g"):
        title, path = group.find(f"{{{SVG}}}title"), group.find(f"{{{SVG}}}path")
        if title is not None and path is not None:
            corners = np.array(re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path.attrib["d"]), float)
            boxes.append((str(title.text), corners.min(0), corners.max(0)))
    texts = []
    for text in root.iter(f"{{{SVG}}}text"):
        place = re.search(r"translate\(([-\d.]+) ([-\d.]+)\)|rotate\([-\d.]+ ([-\d.]+) ([-\d.]+)\)", str(text.attrib))
        assert place is not None, text.attrib
        texts.append((str(text.text), np.array([part for part in place.groups() if part], float)))
    for name, low, high in boxes:
        (number,) = [int(text) for text, at in texts if (low <= at).all() and (at <= high).all()]
        named = re.fullmatch(r"block (\d+), (.+): (\d+) bits", name)
        assert named is not None and int(named[3]) == number
        site = next(site for site, place in drawing.PLACES.items() if place == named[2])
        found[int(named[1]), site] = number
    # In a line of blocks a later one stands to the right, and in a block the sites one below the other.
    at = {name: low for name, low, _ in boxes}
    for block, site in found:
        here = at[f"block {block}, {drawing.PLACES[site]}: {found[block, site]} bits"]
        if (block + 1, site) in found and (block + 1) % drawing.ACROSS:
            right = at[f"block {block + 1}, {drawing.PLACES[site]}: {found[block + 1, site]} bits"]
            assert right[0] > here[0] and right[1] == pytest.approx(here[1])
        below = SITES[(SITES.index(site) + 1) % len(SITES)]
        if below != SITES[0] and (block, below) in found:
            assert at[f"block {block}, {drawing.PLACES[below]}: {found[block, below]} bits"][1] > here[1]
    return found


@pytest.mark.parametrize("blocks", [1, 3, 40])
def test_no_cell_is_wrong(blocks: int) -> None:
    budget = made(blocks)
    picture = drawing.bits_by_block(budget, blocks)
    chosen = {(unit.block, unit.site): unit.bits for unit in budget.units}
    assert cells(picture.svg) == chosen
    assert picture.rows == [[str(i), *(str(chosen[i, site]) for site in SITES)] for i in range(blocks)]
    assert "empty cell" not in picture.text


def test_what_was_overridden_is_empty() -> None:
    budget = made(3, frozenset({(0, "down"), *((2, site) for site in SITES)}))
    picture = drawing.bits_by_block(budget, 3)
    assert len(cells(picture.svg)) == 7 and "empty cell" in picture.text
    assert picture.rows[0][4] == "" and picture.rows[2] == ["2", "", "", "", ""]


def test_the_dearest_and_their_steps() -> None:
    budget = made(5)
    rows = drawing.dearest_units(budget).rows
    assert len(rows) == 10
    dearest = sorted(budget.units, key=lambda unit: -unit.costs[unit.bits])
    for row, unit in zip(rows, dearest, strict=False):
        assert row[:2] == [f"block {unit.block}, {drawing.PLACES[unit.site]}", str(unit.bits)]
        at = CHOICES.index(unit.bits)
        for cell, step in zip(row[2:], (at - 1, at, at + 1), strict=True):
            there = 0 <= step < len(CHOICES)
            assert cell == (f"{unit.costs[CHOICES[step]]:.3g} ({CHOICES[step]} bits)" if there else "")


@pytest.mark.parametrize("cost", [0.0, 1e-3])
def test_units_without_a_choice_or_a_cost(cost: float) -> None:
    """An expert that saw no token costs nothing, which no logarithm shows."""
    unit = UnitEntry(block=0, site="down", layers=("x",), bits=4, costs={4: cost})
    picture = drawing.dearest_units(BudgetEntry(units=(unit,), room=10, taken=10))
    assert picture.rows == [["block 0, down", "4", "", f"{cost:.3g} (4 bits)", ""]]


@pytest.mark.usefixtures("undrawn")
def test_the_page_has_it_where_there_is_a_budget() -> None:
    report = copy.deepcopy(REPORT) | {"budget": made(3).model_dump(mode="json")}
    html = page(contents(report=report, layers=[], activations={}, storage={}))
    text = re.sub(r"<svg.*?</svg>", "", html, flags=re.S)
    total = sum(unit.costs[unit.bits] for unit in made(3).units)
    assert "left 2,000,000 bytes for these layers, and they take 1,990,000 (99.5%)" in text
    assert f"adds up to {total:.3g} nats" in text
    assert "tiny: weights in 2 to 8 bits by a budget, activations in 4 bits" in text
    assert drawing.bits_by_block(made(3), 3).svg in html and "The dearest units" in text
    assert "the budget" not in page(contents(layers=[], activations={}, storage={}))
