"""Overrides: schemes of some layers that differ from those of the whole model, as a recipe has them."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_serializer, model_validator

from .values import Bits

TEXT = "PATTERN: weights.bits=4 weights.group_size=64; PATTERN: ..., or a list with layers, weights and activations"
_BLOCKS = re.compile(r"blocks?\s+([-\d,\s]+)")


class OverriddenArgs(BaseModel):
    """What of a layer's weights or inputs is other than in the whole model; what is not given stays."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Bits | None = None
    group_size: int | None = Field(default=None, ge=8)
    symmetric: bool | None = None
    format: Literal["int", "nvfp4", "mxfp4", "fp8", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"] | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Reads 'none' of a group size; no bool is a number."""
        if info.field_name == "group_size" and isinstance(value, str) and value.strip().lower() in ("none", "null"):
            return None
        if value == "" or (value is None and info.field_name != "group_size"):
            raise ValueError("not a value for this field")
        if isinstance(value, bool) != (info.field_name == "symmetric") and not isinstance(value, str):
            raise ValueError("not a value for this field")
        return value

    def given(self) -> dict[str, Any]:
        """What was given, by the names of `QuantizationArgs`."""
        names = {"bits": "num_bits"}
        return {names.get(name, name): getattr(self, name) for name in sorted(self.model_fields_set)}


class Override(BaseModel):
    """Some layers, and what is other for them.

    `layers` are globs on the full names of modules, such as `*.down_proj` or `model.layers.0.*`, or blocks by their
    numbers, such as `blocks 0, 29` or `blocks 0-3` (the last is -1).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: tuple[str, ...]
    weights: OverriddenArgs = OverriddenArgs()
    activations: OverriddenArgs = OverriddenArgs()

    @field_validator("layers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [value] if _BLOCKS.fullmatch(value.strip()) else value.split(",")
        if not isinstance(value, list | tuple) or not value or not all(isinstance(v, str) and v.strip() for v in value):
            raise ValueError("no pattern")
        return tuple(part.strip() for part in value)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.weights.model_fields_set and not self.activations.model_fields_set:
            raise ValueError("nothing is overridden")
        return self

    @model_serializer
    def _as_given(self) -> dict[str, Any]:
        """Without what was not given: a group size of none is something else than no group size."""
        parts = {name: getattr(self, name).model_dump(exclude_unset=True) for name in ("weights", "activations")}
        return {"layers": list(self.layers), **{name: part for name, part in parts.items() if part}}


def read_overrides(value: Any) -> Any:
    """Text of the command line as the list that YAML has; a list stays as it is.

    Raises:
        ValueError: the text is not of the form `TEXT`.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null")):
        return ()
    if not isinstance(value, str):
        return value
    found: list[dict[str, Any]] = []
    for entry in filter(None, (part.strip() for part in value.split(";"))):
        pattern, colon, fields = entry.rpartition(":")
        if not colon:
            raise ValueError("no colon behind a pattern")
        override: dict[str, Any] = {"layers": pattern}
        for field in fields.split():
            name, _, given = field.partition("=")
            section, _, leaf = name.partition(".")
            override.setdefault(section, {})[leaf] = yaml.safe_load(given)
        found.append(override)
    return found


def chosen(pattern: str, names: Iterable[str], prefix: str, blocks: int) -> list[str]:
    """The layers that a pattern of `Override.layers` names, in their order.

    Args:
        pattern: a glob on full names, or `blocks` and numbers.
        names: of all layers there are.
        prefix: of the names of blocks, such as `model.layers`.
        blocks: how many there are.
    """
    numbers = _BLOCKS.fullmatch(pattern)
    if numbers is None:
        return [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    wanted: set[int] = set()
    for part in filter(None, (part.strip() for part in numbers[1].split(","))):
        span = re.fullmatch(r"(\d+)\s*-\s*(\d+)", part)
        single = int(part) if re.fullmatch(r"-?\d+", part) else None
        wanted |= set(range(int(span[1]), int(span[2]) + 1)) if span else {single} if single is not None else set()
    wanted = {number + blocks if number < 0 else number for number in wanted}
    starts = tuple(f"{prefix}.{number}." for number in wanted)
    return [name for name in names if name.startswith(starts)] if starts else []


def nearest(pattern: str, names: Iterable[str]) -> list[str]:
    """Patterns near to one that names nothing: globs of the last parts of names, and the names themselves."""
    names = list(names)
    short = dict.fromkeys("*." + name.rpartition(".")[2] if "." in name else name for name in names)
    ends = [glob for glob in short if glob.endswith(pattern.rpartition(".")[2])]
    return ends or difflib.get_close_matches(pattern, [*short, *names], 2, 0.4)
