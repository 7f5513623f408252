"""What is measured of a model, as it is written down: perplexity, divergence, tasks, and where the loss comes from."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Stored(BaseModel):
    """Facts that go into a file: typed, frozen, and without keys that nobody knows."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold of it; what was never set is left out."""
        return self.model_dump(mode="json", exclude_unset=True)


class Perplexities(Stored):
    """On one text. None where a model was not measured; `rtn` is rounding to nearest, without rotation."""

    full_precision: float | None = None
    rtn: float | None = None
    quantized: float | None = None


class Distance(Stored):
    """How far predictions are from those of full precision: KL in nats, and the part of tokens with the same choice."""

    kl: float | None = None
    top1: float | None = None


class Divergences(Distance):
    """Of the quantized model on one text, and of `rtn` where it was measured."""

    rtn: Distance | None = None


class TaskScore(Stored):
    """Scores of a zero-shot task and their standard errors; `stderr` is that of the quantized model.

    `limit`: how many items were used, where that was not all of them.
    """

    metric: str = ""
    full_precision: float | None = None
    full_precision_stderr: float | None = None
    rtn: float | None = None
    rtn_stderr: float | None = None
    quantized: float | None = None
    stderr: float | None = None
    limit: int | None = None


class Sources(Stored):
    """What each quantizer costs alone, all else in full precision.

    Attributes:
        kl: from full precision, in nats, by source, the mean over next tokens.
        exact: the same of the rotated model with no quantizer on: what the measure itself is off by.
        blocks: by source, what each block by itself adds to the residual stream: |h' - h|^2 / |h|^2 at its output.
        dataset: the text.
        tokens: windows of it, and their length.
    """

    kl: dict[str, float]
    exact: float
    blocks: dict[str, tuple[float, ...]]
    dataset: str
    tokens: tuple[int, int]
