"""What the sections of a recipe have in common: no unknown fields, and values as they are written."""

from __future__ import annotations

from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A part of a recipe; frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Reads 'none' as None where a field can be None, in YAML and on the command line; no bool is a number."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, str) and value.strip().lower() in ("none", "null") and NoneType in get_args(annotation):
            return None
        switch = bool in (annotation, *get_args(annotation)) or info.field_name in ("zfold", "r1")
        if value == "" or (isinstance(value, bool) and not switch):
            raise ValueError("not a value for this field")
        return value
