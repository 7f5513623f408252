"""Operations and bytes of a block and of a whole run by stage, as a recipe asks for them; notation as in `counting`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...boa.block.block_output import TOKENS
from ...boa.objective.statistics import value_stride
from ...boa.online.activations import SEARCHED
from ...boa.solver.rounding import Settings
from ..recipe.recipe import Recipe
from ..recipe.settings import moves_head, settings_of
from .counting import (
    FLOAT,
    Online,
    Sizes,
    Work,
    forward,
    head_statistics,
    input_statistics,
    linear,
    moved,
    plain,
    rotation,
    streams,
    total,
    value_statistics,
)
from .counting_solver import grid_search, problems, references, solve

SOURCE_WINDOWS = 4  # of text that sources are measured on, at most: every block runs twice for each


@dataclass(frozen=True)
class Plan:
    """What a recipe asks for, as the counts see it.

    Attributes:
        settings: of the rounding.
        samples, length, batch: of the calibration set, and how many sequences at a time.
        all_samples: those of all ranks, where `samples` are those of one; None: `samples`. The values' stride goes by
            them.
        online: what runs beside the layers.
        r1, r2: rotations that are folded.
        references: whether RTN and plain GPTQ are measured beside the method.
        head: whether the output layer is moved.
        windows: of `length` tokens that are evaluated; 0 for none.
        baseline: whether RTN is evaluated too.
        sources: quantizers that are measured alone, and all together; 0 for none.
    """

    settings: Settings
    samples: int
    length: int
    batch: int
    online: Online
    r1: bool = True
    r2: bool = True
    references: bool = False
    head: bool = False
    windows: int = 0
    baseline: bool = True
    sources: int = 0
    all_samples: int | None = None

    @classmethod
    def of(cls, recipe: Recipe, length: int, windows: int | None) -> Plan:
        """That of a recipe, on sequences of `length` tokens; `windows` None is not counted."""
        rotation, cache = recipe.rotation, recipe.cache
        bits = recipe.activations.bits, min(cache.key_bits, cache.value_bits)
        return cls(
            settings_of(recipe),
            recipe.calibration.samples,
            length,
            recipe.calibration.batch,
            Online(
                rotation.r3,
                rotation.r4,
                activations=bits[0] < 16,
                cache=bits[1] < 16,
                search_activations=recipe.activations.search and bits[0] <= SEARCHED,
                search_cache=cache.search and bits[1] <= SEARCHED,
                r1=rotation.r1,
                heads=rotation.heads,
            ),
            r1=rotation.r1 != "none",
            r2=rotation.r2,
            references=recipe.evaluation.references,
            head=moves_head(recipe),
            windows=windows or 0,
            baseline=recipe.evaluation.baseline,
            sources=_sources(recipe) if recipe.evaluation.sources else 0,
        )


def _sources(recipe: Recipe) -> int:
    inputs = 4 if recipe.activations.bits < 16 else 0
    return 2 + inputs + (recipe.cache.key_bits < 16) + (recipe.cache.value_bits < 16)


def block(sizes: Sizes, run: Plan, window: int | None = None) -> dict[str, Work]:
    """One block by stage."""
    s, settings, samples, length = sizes.shape, run.settings, run.samples, run.length
    stride = value_stride(
        (run.all_samples or samples) * length, s.query_heads // s.key_heads, s.hidden, settings.value_rows
    )
    found = {
        "rotation": rotation(sizes, r1=run.r1, r2=run.r2, r4=run.online.r4, heads=run.online.heads),
        "forward": streams(sizes, samples, length, run.online, window),
        "input statistics": input_statistics(sizes, samples, length, run.batch),
        "head statistics": head_statistics(s, samples * length),
        "value statistics": value_statistics(s, samples, length, window, stride),
    }
    if settings.method == "brecq":  # a step is a forward and a backward pass
        step = min(math.ceil(TOKENS / length), samples)
        found["forward"] += settings.iterations * 3 * forward(sizes, step, length, window)
    for p in problems(sizes):
        for name, work in solve(p, settings).items():
            found[name] = found.get(name, Work()) + p.count * work
        if run.references:
            found["references"] = found.get("references", Work()) + p.count * references(p, settings)
    return found


def quantization(sizes: Sizes, run: Plan) -> dict[str, Work]:
    """All blocks by stage, and `head`: the output layer moved."""
    found: dict[str, Work] = {}
    windows = [sizes.window(i) for i in range(sizes.shape.blocks)]
    for window in sorted(set(windows), key=str):
        for name, work in block(sizes, run, window).items():
            found[name] = found.get(name, Work()) + windows.count(window) * work
    if run.head:
        found["head"] = head(sizes, run.samples * run.length)
    return found


def head(sizes: Sizes, tokens: float) -> Work:
    """H_in and residual of the output layer, 3 T c^2, and its target, 4 V c^2 for a vocabulary of V."""
    c, vocabulary = sizes.shape.hidden, sizes.shape.vocabulary
    shift = Work(2 * vocabulary * c * c, wide=2 * vocabulary * c * c + c**3 / 3)
    return Work(tokens * c * (3 * c + 1), bytes=FLOAT * 2 * tokens * c) + shift


def evaluation(sizes: Sizes, run: Plan) -> Work:
    """Full precision, RTN where it is asked for, and the result: a pass and the logits of each.

    Sources, where they are asked for.
    """
    s, tokens = sizes.shape, run.windows * run.length
    if not tokens:
        return Work()
    models = 3 if run.baseline else 2
    logits = linear(tokens, s.vocabulary, s.hidden) + moved(tokens * s.vocabulary, 8)
    work = models * plain(sizes, run.windows, run.length) + models * logits
    if run.sources:  # each twice, for KL and by block, beside the original and the rotated model
        windows = min(run.windows, SOURCE_WINDOWS)
        work += (2 + 2 * run.sources) * plain(sizes, windows, run.length)
        work += (2 + run.sources) * (windows / run.windows) * logits
    if run.baseline:
        work += s.blocks * total(p.count * grid_search(p, run.settings) for p in problems(sizes))
    return work


def whole(sizes: Sizes, run: Plan) -> dict[str, Work]:
    """The whole run by stage: `plain forward pass`, the stages of `quantization`, `evaluation`."""
    passes = {"plain forward pass": plain(sizes, run.samples, run.length)}
    return passes | quantization(sizes, run) | {"evaluation": evaluation(sizes, run)}
