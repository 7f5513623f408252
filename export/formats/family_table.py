"""The table of architectures: what each has, as `rotoboa models` lists it and docs/models.md shows it."""

from __future__ import annotations

from typing import NamedTuple

from ...models.families import FAMILIES
from ...models.family import Family
from ..finished import has_joined_layout, has_plain_layout
from .gguf_architectures import ARCHITECTURES
from .mlx import FAMILIES as OF_MLX

HEAD = ("`model_type`", "R1", "attention-aware", "formats", "what is special")


class Line(NamedTuple):
    """One line of the table, as text.

    Attributes:
        r1: where it can stand; R2, R3 and R4 stand wherever R1 can.
        attention: whether queries, keys and values have objectives that know attention.
        formats: of exports, beside native.
    """

    model_type: str
    r1: str
    attention: str
    formats: str
    note: str


def formats_of(family: Family) -> tuple[str, ...]:
    """The formats that a run of the family can be written in."""
    plain: tuple[str, ...] = ("compressed-tensors",) if has_joined_layout(family) else ()
    plain += ("gptq",) if has_plain_layout(family) and not family.sight else ()
    gguf = ("gguf",) if family.model_type in ARCHITECTURES else ()
    mlx = ("mlx",) if family.model_type in OF_MLX else ()
    return ("native", *plain, *gguf, *mlx)


def lines() -> list[Line]:
    """A line for each row, by name, and one for what has none."""
    found = [
        Line(
            f"`{name}`",
            "online" if family.post_norms else "merged or online",
            "where there is attention" if family.hybrid else "yes",
            ", ".join(formats_of(family)),
            family.note,
        )
        for name, family in sorted(FAMILIES.items())
    ]
    rest = "its linear layers are found by running it, and quantized each by itself; all else stays as it is"
    return [*found, Line("any other causal decoder", "no", "no", "native", rest)]


def markdown() -> str:
    """The table as docs/models.md has it."""
    rows = [HEAD, ("---",) * len(HEAD), *lines()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows).replace("| --- ", "|---").replace("|--- |", "|---|")
