"""Recipe: the one description of a run, read alike by YAML files, the command line and the Python API.

Every field carries its own description, which is the text of `rotoboa quantize --help` (`recipe_fields`). Recipes are
frozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, ValidationError

from ...boa.solver.rounding_settings import Settings
from ...errors import InputError
from .overrides import TEXT, Override, read_overrides
from .section import Section
from .values import Bits, Blocks, Choices, EndFormat, Legal, Names, Placement, Sites, WeightBits


class Rotation(Section):
    """Rotation (orthogonal matrices that spread outliers over the channels)."""

    r1: Placement = Field(
        default="merged",
        description="Where R1 stands, which spreads outliers over the hidden channels. merged: in the residual stream, "
        "free at run time (QuaRot); online: behind the norms, a Hadamard transform at the inputs of q, k, v and of "
        "gate and up, which rounds what the layers read; none: nowhere; auto: merged, or none in a model whose norms "
        "make that harmful (why: docs/methods.md#rotations).",
    )
    r2: bool = Field(default=True, description="Rotate the values of each head, between V and O. Free at run time.")
    r3: bool = Field(default=False, description="Rotate queries and keys after RoPE, online: for low-bit keys.")
    r4: bool = Field(default=False, description="Rotate the input of down, online: for low-bit activations.")
    r4_blocks: bool = Field(
        default=False,
        description="Make R4 of blocks of the largest power of two that divides its width, as vLLM can run it.",
    )
    blocks: Blocks = Field(
        default=None,
        description="Channels of each diagonal block of R1, R2 and R4, for inputs and weights whose groups have scales "
        "of their own (R2 has no more than a head's); none: a rotation mixes all channels.",
    )
    heads: bool = Field(
        default=False, description="Rotate the input of O over all heads, online, as QuaRot does: for low-bit inputs."
    )
    scale: bool = Field(
        default=False,
        description="Balance the channels of every input against the weights that read them, before it is rotated, and "
        "of quantized keys against the queries. Free at run time (why: docs/methods.md#balance).",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of the random signs of the Hadamard matrices.")
    seeds: int = Field(
        default=1,
        ge=1,
        description="How many seeds, from the above on, are tried on a little calibration text; the one that loses "
        "least to rounding to nearest is used.",
    )


class Weights(Section, Settings):
    """Weights (their grid, and how they are rounded to it)."""

    bits: WeightBits = Field(default=4, description=Settings.model_fields["bits"].description)
    group_size: int | None = Field(default=None, ge=8, description=Settings.model_fields["group_size"].description)
    grid: Literal["auto", "minmax", "diagonal", "hessian"] = Field(  # type: ignore[assignment]
        default="auto",
        description="How scale and zero point are chosen. minmax: the full range of the weights; diagonal: a search "
        "over smaller ranges, weighting errors by the diagonal of the input Hessian; hessian: by all of it; auto: "
        "diagonal with R1, hessian without it.",
    )
    head: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="How far the output layer, which stays as it is otherwise, makes up for what the last hidden "
        "states have lost.",
    )
    budget: float | None = Field(
        default=None,
        ge=2,
        le=8,
        description="Bits a weight of the blocks on average, scales included, spent where they count, in place of "
        "weights.bits (why: docs/methods.md#a-budget).",
    )
    size: Annotated[ByteSize | None, Legal("a size such as 1.2GiB")] = Field(
        default=None, gt=0, description="Bytes of the whole file that the bits of layers are chosen for, likewise."
    )
    choices: Choices = Field(
        default=(2, 3, 4, 8),
        description="What a budget chooses from, bits or formats (q2_k,q4_k,q6_k): those that the export's kernels "
        "have.",
    )
    zfold: Sites = Field(  # type: ignore[assignment]
        default=None, description=Settings.model_fields["zfold"].description
    )


class Embedding(Section):
    """Embedding (rounded to nearest, on scales that are searched)."""

    bits: Bits = Field(default=16, description="Bits of a weight of the embedding.")
    format: EndFormat = Field(
        default="int",
        description="The numbers of the embedding. int: integers of embedding.bits; q2_k to q6_k: those of GGUF's K "
        "types, with bits and groups of their own.",
    )
    group_size: int | None = Field(default=None, ge=8, description="Channels that share a scale; none: all of them.")
    symmetric: bool = Field(default=False, description="Fix the zero point at the middle of the grid.")


class Head(Section):
    """Head (the output layer, rounded as the layers of the blocks are, by what it reads)."""

    bits: Bits = Field(
        default=16, description="Bits of a weight of the output layer; where it stays the embedding, those of that."
    )
    format: EndFormat = Field(
        default="int", description="The numbers of the output layer, as embedding.format has them, with head.bits."
    )
    group_size: int | None = Field(default=None, ge=8, description="Channels that share a scale; none: all of them.")
    symmetric: bool = Field(default=False, description="Fix the zero point at the middle of the grid.")


class Activations(Section):
    """Activations (inputs of linear layers, quantized per token as the model runs)."""

    bits: Bits = Field(default=16, description="Bits of an activation.")
    format: Literal["int", "nvfp4", "mxfp4", "fp8"] = Field(
        default="int",
        description="The numbers of activations. int: integers; nvfp4, mxfp4, fp8: floating point, in groups and "
        "with scales as weights.format has them (fp8: of a token), and without clip ratios.",
    )
    group_size: int | None = Field(
        default=None,
        ge=8,
        description="Channels of a token that share a scale, after online rotations; none: all of them.",
    )
    symmetric: bool = Field(default=True, description="Quantize without a zero point.")
    dynamic: bool = Field(
        default=True,
        description="Find the scales of fp8 as the model runs, one for each token; if not, calibration finds one for "
        "the input of each layer.",
    )
    clip: float = Field(
        default=0.9, gt=0, le=1, description="Part of a token's range that the grid covers; the rest is clipped."
    )
    search: bool = Field(
        default=True,
        description="Every token chooses its clip ratio as the model runs, by its least squared error, in place of "
        "clip; none is clipped at more than 4 bits (why: docs/methods.md#clip-ratios).",
    )
    directions: int = Field(
        default=0, ge=0, description="Directions of inputs kept in 8 bits (why: docs/methods.md#leading-directions)."
    )
    convention: Literal["rotoboa", "compressed-tensors", "vllm"] = Field(
        default="rotoboa",
        description="Whose scales: by clip or search (rotoboa), or those of what runs the export: max |x| / 127.5 at "
        "8 bits (compressed-tensors, as transformers computes), or / 127 (vllm).",
    )


class Cache(Section):
    """Cache (keys and values, quantized per token and head, with a zero point)."""

    key_bits: Bits = Field(default=16, description="Bits of a cached key.")
    value_bits: Bits = Field(default=16, description="Bits of a cached value.")
    format: Literal["int", "fp8"] = Field(
        default="int",
        description="The numbers of keys and values. int: integers, with a scale for each vector; fp8: floating point "
        "(E4M3) of 8 bits, with one scale for the keys of a layer and one for its values, found in calibration.",
    )
    clip: float = Field(
        default=0.95, gt=0, le=1, description="Part of the range that the grid covers; the rest is clipped."
    )
    search: bool = Field(
        default=True,
        description="Every vector chooses its clip ratio as it is stored, by its least squared error, in place of "
        "clip; none is clipped at more than 4 bits.",
    )
    center: bool = Field(
        default=True,
        description="Round keys without what all keys of a head have in common, their mean over the calibration text "
        "(why: docs/methods.md#keys).",
    )
    sink: int = Field(
        default=0,
        ge=0,
        description="Positions of the cache, from the first, that stay in 16 bits: keys and values of a sequence's "
        "first tokens are unlike all others.",
    )
    served_by: Literal["rotoboa", "vllm", "llama.cpp"] = Field(
        default="rotoboa",
        description="Whose cache calibration follows: rotoboa, with all of the above and R3; vllm or llama.cpp, which "
        "turn and round keys and values by themselves, without any of it (why: docs/formats.md#the-cache-as-served).",
    )


class Calibration(Section):
    """Calibration (the text that the Hessians are measured on)."""

    dataset: str | None = Field(
        default=None,
        description="stdlib, wikitext2, c4, or text: a file (also .jsonl, .json, .csv or .parquet with a field text) "
        "or a folder of such, several with commas; none: the model's default.",
    )
    samples: int = Field(default=128, ge=1, description="Number of sequences.")
    sequence_length: int | None = Field(
        default=None, ge=2, description="Tokens of a sequence; none: the model's default."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the choice of sequences.")
    batch: int = Field(default=8, ge=1, description="Sequences computed at a time: fewer need less memory.")


class Evaluation(Section):
    """Evaluation (what is measured when the weights are done)."""

    dataset: Names = Field(
        default=None, description="Text for perplexity and divergence, as for calibration; several with commas."
    )
    split: Literal["evaluation", "validation"] = Field(
        default="evaluation", description="evaluation: the text to report; validation: other text, to choose by."
    )
    windows: int | None = Field(
        default=None, ge=1, description="Windows of text to measure; none: all, or the model's default."
    )
    baseline: bool = Field(default=True, description="Also measure the model rounded to nearest without rotation.")
    tasks: Names = Field(
        default=None,
        description="Zero-shot tasks, names of lm-eval with commas; default: for the embedded model the three made "
        "for it, for others the eight of the BoA paper.",
    )
    tasks_path: Path | None = Field(
        default=None, description="Folder of lm-eval task files (YAML) that tasks may name too; without tasks, all."
    )
    references: bool = Field(
        default=True, description="Also measure the loss that RTN and plain GPTQ have in each layer, for the report."
    )
    sources: bool = Field(
        default=False,
        description="Also measure what each quantizer costs alone: weights, the inputs of each kind of layer, keys and "
        "values, all else in full precision, on at most 4 windows of the first text.",
    )
    report: bool = Field(default=True, description="Write report.html, with the activations before and after rotation.")


class Recipe(Section):
    """All that decides the result of a run.

    Raises:
        InputError: a field is unknown or has an illegal value, in the words of the command line.
    """

    model: str = Field(
        default="tiny",
        description="An alias (see `rotoboa models`), a folder with a checkpoint, or a Hugging Face model id.",
    )
    rotation: Rotation = Rotation()
    weights: Weights = Weights()
    overrides: Annotated[tuple[Override, ...], BeforeValidator(read_overrides), Legal(TEXT)] = Field(
        default=(),
        description="Layers whose weights or inputs are quantized otherwise than the whole model's: globs on names of "
        "modules, or blocks by numbers; 16 bits leave a layer's weights, or inputs, as they are "
        "(why: docs/guide.md#a-scheme-for-each-layer).",
    )
    embedding: Embedding = Embedding()
    head: Head = Head()
    activations: Activations = Activations()
    cache: Cache = Cache()
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    bos: bool | None = Field(
        default=None,
        description="Begin every window of text, in calibration and evaluation, with the tokenizer's BOS; none: as the "
        "family does, which only Gemma's do.",
    )
    memory: Annotated[ByteSize | None, Legal("a size such as 12GiB")] = Field(
        default=None,
        ge=0,
        description="Host memory for activations; more than that lies in files without a name on the disk of the run; "
        "none: half of what is free.",
    )
    deterministic: bool = Field(
        default=False,
        description="Sum in a fixed order, and on one thread: the same bytes on any number of ranks of torchrun.",
    )
    timeout: int = Field(
        default=600,
        ge=1,
        description="Seconds that the ranks of torchrun wait for one whose work does not go on, before all end.",
    )
    output: Path | None = Field(default=None, description="Folder of the run; none: runs/<model>-<recipe>.")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            from .fields import complaints  # which reads the fields of this class

            raise InputError(f"The recipe cannot be used: {'; '.join(complaints(error))}.") from error
