"""What a model card says of the base model and of what was measured; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Base:
    """The model that was quantized.

    Attributes:
        model: its name or hub id.
        hub: whether it is a hub id.
        licence: None where it is not known.
    """

    model: str
    hub: bool
    licence: str | None


@dataclass(frozen=True)
class Figures:
    """What was measured.

    Attributes:
        perplexity: by text and model, `full_precision`, `rtn` or `quantized`.
        tokens: windows of each text and their length, where they are known.
        bos: whether each window begins with BOS.
        original: bytes of the original model.
    """

    perplexity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)
    bos: bool = False
    original: int | None = None
