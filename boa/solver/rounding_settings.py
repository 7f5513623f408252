"""How weights are rounded: what solver, steps of a block and the section `weights` of a recipe share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from ..scheme import TWO_LEVELS, QuantizationArgs

if TYPE_CHECKING:  # a recipe is read without torch
    from .grid import GridSettings
    from .learned import Learning

LAYERWISE = ("rtn", "gptq", "adaround")
"""Methods that know a layer by its inputs alone: X X^T for values too."""


class Settings(BaseModel):
    """How one projection is rounded.

    | method | H_in | H_out | rows |
    |---|---|---|---|
    | rtn | identity | identity | all |
    | gptq | the objective's | identity | all |
    | boa | the objective's | the objective's | `rows` of each head at a time |
    | adaround, aespa | learned from the result of gptq, boa: see `learned` | | |
    | brecq | as boa; `learn_output` of `boa.block` goes on from there | | |

    `drift`, `attention`, `value_rows` and `value_output` say what the objective is collected from: see the steps of
    `boa.block`.
    `zfold` names the sites whose input channels get a scale of their own first: see `rotation.channels`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    bits: int = Field(ge=2, le=8, description="Bits of a weight.")
    group_size: int | None = Field(
        default=None,
        ge=1,
        description="Input channels that share a scale and zero point; none: all of an output channel.",
    )
    symmetric: bool = Field(default=False, description="Fix the zero point at the middle of the grid.")
    format: Literal["int", "nvfp4", "mxfp4", "fp8", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"] = Field(
        default="int",
        description="The numbers of weights. int: integers; nvfp4: four-bit floating point in groups of 16, scales in "
        "eight bits (E4M3); mxfp4: the same in groups of 32, scales powers of two (E8M0); fp8: floating point of eight "
        "bits (E4M3), a scale for each output channel; q2_k to q6_k: integers whose scales have scales, as GGUF's K "
        "types have them.",
    )
    method: Literal["rtn", "gptq", "boa", "adaround", "aespa", "brecq"] = Field(
        default="boa",
        description="How weights are rounded. rtn: to the nearest; gptq: errors compensated within a row, layer by "
        "layer; boa: also across the rows of an attention head, by what attention makes of them; adaround, aespa: "
        "rounding learned on the objective of gptq, of boa, from their result; brecq: learned by backpropagation on "
        "the output of the block, from the result of boa.",
    )
    rows: int = Field(
        default=4, ge=1, description="Rows of a head rounded at a time by boa: fewer are more exact, and slower."
    )
    act_order: bool = Field(default=True, description="Round the input channels with the largest activations first.")
    grid: Literal["minmax", "diagonal", "hessian"] = Field(
        default="diagonal",
        description="How scale and zero point are chosen. minmax: the full range of the weights; diagonal: a search "
        "over smaller ranges, weighting errors by the diagonal of the input Hessian; hessian: by all of it.",
    )
    damping: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Part of a Hessian's mean diagonal added to its diagonal. GPTQ as published has 0.01 (why more: "
        "docs/methods.md#damping).",
    )
    alpha: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="How much of the error of earlier layers is compensated. 0: none; 1: all that calibration shows "
        "(why recipes take a part of it: docs/methods.md#target).",
    )
    refine: int = Field(default=8, ge=0, description="Rounds of coordinate descent and closed-form scales; 0: none.")
    starts: int = Field(
        default=3,
        ge=1,
        description="How often rows are rounded and refined, from grids of other widths; every row keeps its best.",
    )
    tabu: float = Field(
        default=2.0,
        ge=0,
        description="Moves of a tabu search after refinement, for each input channel of a row; 0: none "
        "(why: docs/methods.md#tabu-search).",
    )
    drift: bool = Field(
        default=True, description="Let O and down also make up for what the residual stream has lost before them."
    )
    zfold: tuple[str, ...] = Field(
        default=(),
        description="A scale per input channel too, folded into the layer before (Z-Fold): true, or the inputs that "
        "get one, of qkv (norm), output (V), gate_up (norm) and down (up).",
    )
    attention: Literal["fisher", "bound"] = Field(
        default="fisher",
        description="What errors of queries and keys cost. fisher: what attention makes of them, by its probabilities; "
        "bound: the same for all, as BoA has it (why: docs/methods.md#queries-and-keys).",
    )
    value_rows: int = Field(
        default=128,
        ge=0,
        description="Values are weighed by the attention of every n-th query, so that this many rows remain for each "
        "input channel; 0: of all queries (why: docs/methods.md#values).",
    )
    value_output: bool = Field(
        default=True, description="Weigh the errors of values by the output projection; false: alike, as aespa does."
    )
    iterations: int = Field(default=2000, ge=1, description="Steps of learned rounding (adaround, aespa, brecq).")
    learning_rate: float = Field(default=0.015, gt=0, description="Learning rate of learned rounding.")
    regulariser: float = Field(
        default=1.5, ge=0, description="How hard learned rounding is driven to integers; 0: not at all."
    )

    _global_scale: float = PrivateAttr(1.0)  # of a tensor: no field of a recipe

    @property
    def learning(self) -> Learning:
        """The part that learns rounding."""
        from .learned import Learning

        return Learning(self.iterations, self.learning_rate, self.regulariser)

    @property
    def grid_settings(self) -> GridSettings:
        """The part that chooses scales."""
        from .grid import GridSettings

        if self.format in TWO_LEVELS:  # whose scales are found as those of integers, and have theirs then
            return GridSettings(self.bits, self.symmetric, self.grid)
        return GridSettings(
            self.bits, self.symmetric or self.format != "int", self.grid, self.format, self._global_scale
        )

    @property
    def global_scale(self) -> float:
        """That of a tensor in NVFP4; 1 in other formats."""
        return self._global_scale

    def of(self, args: QuantizationArgs, global_scale: float = 1.0) -> Settings:
        """The same for the weights of one layer, as `args` has their grid."""
        found = self.but(bits=args.num_bits, group_size=args.group_size, symmetric=args.symmetric, format=args.format)
        return found.with_global_scale(global_scale)

    def with_global_scale(self, global_scale: float) -> Settings:
        """The same for a tensor of NVFP4 that has this one."""
        found = self.but()
        found._global_scale = global_scale
        return found

    def but(self, **changes: Any) -> Settings:
        """The same with other values of some fields."""
        return self.model_copy(update=changes)
