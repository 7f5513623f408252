"""report.json: what a run, and what was measured of it, came to. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pydantic import ConfigDict, Field, field_validator, model_validator

from ...eval.results import Divergences, Perplexities, Sources, Stored, TaskScore
from ...export.formats.card_facts import Base
from .manifest import BudgetEntry

REPORT_VERSION = 1


class Tokens(Stored):
    """(windows, length) of the calibration set, and of each text that was evaluated."""

    calibration: tuple[int, int] | None = None
    evaluation: dict[str, tuple[int, int]] = Field(default_factory=dict)


class Sizes(Stored):
    """Bytes of the tensor files before and after, and of the parts of the finished model."""

    original: int | None = None
    quantized: int | None = None
    blocks: int | None = None
    embedding: int | None = None
    head: int | None = None


class Held(Stored):
    """Bytes in memory, in bfloat16 and packed; of a cache, the number of its `tokens`."""

    tokens: int | None = None
    bfloat16: int
    quantized: int


class Memory(Stored):
    """What the loaded model and the cache of one sequence hold."""

    model: Held
    cache: Held


class Seeds(Stored):
    """Of the rotation that was chosen, and of the calibration set."""

    rotation: int
    calibration: int


class RanksUsed(Stored):
    """How many ranks shared the run, and the bytes that one of them sent."""

    count: int
    bytes: dict[str, int]


class Measured(Stored):
    """What `evaluate` measures of a run; texts and tasks by their names.

    Attributes:
        seconds: by stage.
        bits_per_weight, bits_per_weight_of_file: of what is quantized, and of the whole file by original parameters.
        was_tied: whether embedding and head of the original model were one matrix.
    """

    perplexity: dict[str, Perplexities] = Field(default_factory=dict)
    divergence: dict[str, Divergences] = Field(default_factory=dict)
    sources: Sources | None = None
    tasks: dict[str, TaskScore] = Field(default_factory=dict)
    tokens: Tokens = Tokens()
    bos: bool = False
    seconds: dict[str, float] = Field(default_factory=dict)
    sizes: Sizes = Sizes()
    memory: Memory | None = None
    was_tied: bool = False
    bits_per_weight: float | None = None
    bits_per_weight_of_file: float | None = None


class _Shown(Stored):
    """A section of a recipe of any release: what tables and pages say of it."""

    model_config = ConfigDict(extra="ignore")


class ShownWeights(_Shown):
    """How weights were rounded."""

    method: str
    bits: int
    group_size: int | None = None


class ShownActivations(_Shown):
    """How inputs of layers are."""

    bits: int
    group_size: int | None = None
    directions: int = 0


class ShownCache(_Shown):
    """How keys and values are; `sink` positions stay as they are in caches of ours."""

    key_bits: int
    value_bits: int
    sink: int = 0
    served_by: str = "rotoboa"


class ShownRotation(_Shown):
    """Which rotations; of the first releases `r1` is true or false."""

    r1: bool | str = False
    r2: bool = False
    r3: bool = False
    r4: bool = False
    blocks: int | None = None
    heads: bool = False
    scale: bool = False


class ShownEvaluation(_Shown):
    """Which part of a text was evaluated."""

    split: str | None = None


class ShownRecipe(_Shown):
    """What tables and pages say of a recipe, also of one that no recipe of this release can be."""

    weights: ShownWeights
    activations: ShownActivations
    cache: ShownCache
    rotation: ShownRotation = ShownRotation()
    evaluation: ShownEvaluation = ShownEvaluation()


class Report(Measured):
    """What report.json holds. What a run of an earlier release did not find out has its default.

    Attributes:
        version: of this form; 0 is that of releases that wrote none.
        base: what a model card says of the original model.
        stages: seconds by stage of the quantizer.
        parts: how often the run was started.
        plain_forward_seconds: of one forward pass over the calibration set, which ratios are taken to.
        peak_memory_bytes: by place: `host`, `device`, and `spilled` into files.
        raised_damping: that of layers whose Cholesky decomposition needed more than the recipe has.
        budget: what a budget of bits was spent on.
        recipe: as the release that made the run wrote it; `shown` is what this one reads of it.
    """

    version: int = 0
    model: str
    base: Base | None = None
    stages: dict[str, float] = Field(default_factory=dict)
    parts: int = 1
    plain_forward_seconds: float | None = None
    peak_memory_bytes: dict[str, int] = Field(default_factory=dict)
    raised_damping: dict[str, float] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    notices: tuple[str, ...] = ()
    python: str = ""
    device: str = ""
    recipe: dict[str, Any]
    seeds: Seeds | None = None
    budget: BudgetEntry | None = None
    ranks: RanksUsed | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_releases(cls, data: Any) -> Any:
        """(windows, length) of a single text had no name."""
        if not isinstance(data, Mapping) or data.get("version") or not isinstance(data.get("tokens"), Mapping):
            return data
        shape = data["tokens"].get("evaluation")
        if not isinstance(shape, list) or not isinstance(data.get("perplexity"), Mapping):
            return data
        named = dict.fromkeys(data["perplexity"], shape)
        return {**data, "tokens": {**data["tokens"], "evaluation": named}}

    @field_validator("recipe")
    @classmethod
    def _can_be_shown(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        ShownRecipe.model_validate(recipe)
        return recipe

    @cached_property
    def shown(self) -> ShownRecipe:
        """What tables and pages say of the recipe."""
        return ShownRecipe.model_validate(self.recipe)

    def to_json(self) -> dict[str, Any]:
        """As of any facts; what a reader looks for first stands first."""
        data = super().to_json()
        return {name: data[name] for name in ("version", "model", "base") if name in data} | data
