"""Values of a recipe's fields that bounds alone do not describe: what is taken, and the words for it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator

from ...boa.scheme import FLOATS, TWO_LEVELS
from ...models.families import SITES


class Legal(NamedTuple):
    """Marks an annotation with the words for its legal values, where bounds alone do not say it."""

    text: str


def _check_bits(bits: int) -> int:
    if bits not in (*range(2, 9), 16):
        raise ValueError("not a supported bit width")
    return bits


def _check_weight_bits(bits: int) -> int:
    if bits not in range(2, 9):
        raise ValueError("not a supported bit width")
    return bits


def split_names(value: Any) -> Any:
    """'a, b' -> ['a', 'b']; a list stays as it is, so that a name in it may hold a comma."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def _check_names(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if names is not None and (not names or not all(names) or len(set(names)) < len(names)):
        raise ValueError("no names, an empty name or the same name twice")
    return names


Names = Annotated[
    tuple[str, ...] | None,
    BeforeValidator(split_names),
    AfterValidator(_check_names),
    Legal("a name, or several with commas between them or as a list, each once"),
]


def _placement(value: Any) -> Any:
    """Recipes of before the placement was a choice say true or false."""
    value = {"true": True, "false": False}.get(value.strip().lower(), value) if isinstance(value, str) else value
    return {True: "merged", False: "none"}[value] if isinstance(value, bool) else value


Placement = Annotated[Literal["auto", "merged", "online", "none"], BeforeValidator(_placement)]


def _sites(value: Any) -> Any:
    """True is all sites, False none."""
    value = {"true": True, "false": False}.get(value.strip().lower(), value) if isinstance(value, str) else value
    return (SITES if value else None) if isinstance(value, bool) else split_names(value)


def _check_sites(sites: tuple[str, ...] | None) -> tuple[str, ...] | None:
    _check_names(sites)
    if not set(sites or ()) <= set(SITES):
        raise ValueError("not a site")
    return None if sites is None else tuple(site for site in SITES if site in sites)


Sites = Annotated[
    tuple[str, ...] | None,
    BeforeValidator(_sites),
    AfterValidator(_check_sites),
    Legal(f"true, false, or some of {', '.join(SITES)} with commas between them or as a list, each once"),
]


EndFormat = Literal["int", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
"""Formats of embedding and head: integers, and those whose scales have scales (`TWO_LEVELS`)."""
FORMATS: dict[str, int] = {name: bits for formats in (FLOATS, TWO_LEVELS) for name, (bits, *_) in formats.items()}
"""Bits of the formats of weights that are not plain integers."""


def bits_of(choice: int | str) -> int:
    """Of one of the choices of a budget."""
    return FORMATS[choice] if isinstance(choice, str) else choice


def _check_choices(choices: tuple[int | str, ...]) -> tuple[int | str, ...]:
    found = [int(choice) if str(choice).isdecimal() else choice for choice in choices]
    if not found or any(one not in FORMATS if isinstance(one, str) else one not in range(2, 9) for one in found):
        raise ValueError("no bit widths")
    if len({bits_of(one) for one in found}) < len(set(found)):
        raise ValueError("two of one width")
    return tuple(sorted(set(found), key=bits_of))


Choices = Annotated[
    tuple[int | str, ...],
    BeforeValidator(split_names),
    AfterValidator(_check_choices),
    Legal(f"some of 2 to 8 and {', '.join(FORMATS)}, of each width one, with commas between them or as a list"),
]
BLOCKS = (16, 32, 64, 128)
"""Channels of a diagonal block of a rotation."""


def _check_blocks(blocks: int | None) -> int | None:
    if blocks not in (None, *BLOCKS):
        raise ValueError("not a size of blocks")
    return blocks


Blocks = Annotated[int | None, AfterValidator(_check_blocks), Legal("16, 32, 64 or 128")]
WeightBits = Annotated[int, AfterValidator(_check_weight_bits), Legal("2 to 8")]
Bits = Annotated[int, AfterValidator(_check_bits), Legal("2 to 8, or 16 for no quantization")]
