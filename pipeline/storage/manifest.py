"""manifest.json: which run a folder holds, and how far it is. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from ...eval.results import Sources, Stored

MANIFEST_VERSION = 1


class Identity(Stored):
    """What makes two runs the same.

    Attributes:
        recipe: without its output, as the release that made the run wrote it.
        versions: of what computes.
        checkpoint: SHA-256 of each of its files; None where that is not known yet, or was not kept.
        text: SHA-256 of token ids, by what they are for.
        bos: whether windows of text begin with BOS; the first releases did not say it, and had none.
    """

    recipe: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    checkpoint: dict[str, str] | None = None
    text: dict[str, str] | None = None
    bos: bool | None = None


class LayerEntry(Stored):
    """A projection that was quantized.

    Attributes:
        loss: relative to that of a zero weight.
        objective: the same on one objective for this run and for its references, by method.
        fallback_tokens: how many tokens an expert saw, where they were too few.
        damping: where more was needed than the recipe has.
    """

    loss: float
    objective: dict[str, float] | None = None
    fallback_tokens: int | None = None
    damping: float | None = None


class BlockEntry(Stored):
    """A finished block: its file's SHA-256, seconds in all and by stage, and what was found.

    Attributes:
        zfold: by site, both losses and the range of the scales.
        output_error: of the block's output, before and after it was learned.
    """

    index: int
    seconds: float | None = None
    stages: dict[str, float] = Field(default_factory=dict)
    layers: dict[str, LayerEntry] = Field(default_factory=dict)
    zfold: dict[str, dict[str, float]] | None = None
    output_error: tuple[float, float] | None = None
    sha256: str = ""


class UnitEntry(Stored):
    """Layers of one site of one block that share the bits that a budget chose; costs of each choice in nats."""

    block: int
    site: str
    layers: tuple[str, ...]
    bits: int
    costs: dict[int, float]


class BudgetEntry(Stored):
    """What a budget was spent on: bytes that were there for these layers, and that they take."""

    units: tuple[UnitEntry, ...]
    room: int
    taken: int


class FileState(Stored):
    """A file of the checkpoint, and by what it is known unchanged: bytes, and times of two kinds in nanoseconds."""

    sha256: str
    state: tuple[int, int, int]


class Manifest(Stored):
    """What manifest.json holds. What is not known yet is not set: `knows` tells that from None.

    Attributes:
        version: of this form; 0 is that of releases that wrote none.
        blocks: those that are finished, from the first one on.
        notices: what was said before the work began.
        files: of the checkpoint.
        checkpoint_folder: where a checkpoint given as a folder was.
        parts: how often the run was started.
        seconds: by stage, up to now.
        r1_noise: how much louder R1 merged makes the noise of rounding; None where it is not merged.
        rotation_seed: the one that was chosen.
        budget: the bits that were chosen; None where the recipe has no budget.
        peak_memory_bytes: by place, the most of any part.
        model: SHA-256 of each file of the exported model.
    """

    version: int = 0
    identity: Identity
    blocks: tuple[BlockEntry, ...] = ()
    notices: tuple[str, ...] = ()
    files: dict[str, FileState] = Field(default_factory=dict)
    checkpoint_folder: str | None = None
    parts: int = 0
    seconds: dict[str, float] = Field(default_factory=dict)
    r1_noise: float | None = None
    rotation_seed: int | None = None
    budget: BudgetEntry | None = None
    plain_forward_seconds: float | None = None
    peak_memory_bytes: dict[str, int] = Field(default_factory=dict)
    model: dict[str, str] = Field(default_factory=dict)
    sources: Sources | None = None
    finished: bool = False

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_releases(cls, data: Any) -> Any:
        """Blocks listed the clip ratios that were found, which the blocks themselves hold."""
        if not isinstance(data, Mapping) or data.get("version") or not isinstance(data.get("blocks"), list):
            return data
        blocks = [
            {name: fact for name, fact in block.items() if name != "clips"} if isinstance(block, Mapping) else block
            for block in data["blocks"]
        ]
        return {**data, "blocks": blocks}

    def knows(self, fact: str) -> bool:
        """Whether a fact has been found out, be it None."""
        return fact in self.model_fields_set

    def including(self, **facts: Any) -> Manifest:
        """This manifest with other facts."""
        known = {name: getattr(self, name) for name in self.model_fields_set}
        return Manifest.model_validate({**known, "version": MANIFEST_VERSION, **facts})
