"""The table of architectures: docs/models.md shows it, and it says what exports take."""

from pathlib import Path

from rotoboa.errors import InputError
from rotoboa.export.finished import refuse_layout
from rotoboa.export.formats.family_table import formats_of, lines, markdown
from rotoboa.models.families import FAMILIES

PAGE = Path(__file__).parents[3] / "docs" / "models.md"


def test_the_page_shows_it() -> None:
    shown = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert "\n".join(shown) == markdown(), "put the right side into docs/models.md"


def test_every_row_says_what_is_special() -> None:
    assert len(lines()) == len(FAMILIES) + 1
    assert all(line.note for line in lines())


def test_formats_are_those_that_take_it() -> None:
    """Of layouts: what a recipe asks for may keep a run out of a format as well."""
    for family in FAMILIES.values():
        formats = formats_of(family)
        for format_name, joins in (("compressed-tensors", True), ("gptq", False)):
            try:
                refuse_layout(family, "it", joins=joins)
            except InputError:
                assert format_name not in formats
            else:
                assert (format_name in formats) == (joins or family.sight is None)
