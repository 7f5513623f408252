"""Bytes that a run holds where most is, in memory and on disk, counted from sizes.

What is held at once is read off the code: both versions of a block, statistics, the solver's copies of Hessians (four
bytes as collected, eight as factored) and of rows (four each), a batch's activations. On a processor all of it is the
host's. `PROCESS` is what a process holds besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...export.stored_sizes import stored_bytes
from ...models.shape import Shape
from ..job.job import Job
from ..recipe.settings import changed_outer_layers, stays_tied
from .workload import Plan, Sizes, Stack, before_mlp, problems

FLOAT, DOUBLE = 4, 8  # bytes
# Python, torch, transformers, numba's compiler, the text: what a run of next to no tokens peaks at
PROCESS = 700 * 2**20
OTHERS = 2**24  # bytes of what else a run writes: tokenizer, manifest, report


@dataclass(frozen=True)
class Footprint:
    """Bytes by stage, without `PROCESS` and without `activation_bytes`, those of all tokens.

    Attributes:
        rotation: a block in float64 and float32, on the host.
        forward: both versions of a block, a batch on its way through it, statistics.
        solver: both versions, statistics, the largest problem.
        evaluation: a block, embedding and head, logits of a window.
    """

    rotation: float
    forward: float
    solver: float
    evaluation: float

    @property
    def device(self) -> float:
        """The most that is where blocks compute."""
        return max(self.forward, self.solver, self.evaluation)

    @property
    def peak(self) -> float:
        """The most of all, where host and device are one."""
        return max(self.rotation, self.device)


def activation_bytes(
    shape: Shape, tokens: int, method: str, *, parallel: bool = False, mixed: int = 0
) -> dict[str, int]:
    """Bytes of both streams, and of what a block holds for all tokens at once, in float32.

    Once more where the method is brecq, and where the MLP of a block reads what attention does (`parallel`). `mixed`:
    the width of what stands in attention's place puts out, in some blocks.
    """
    mlp = max(2 * shape.hidden if shape.experts else shape.ffn, shape.dense_ffn)  # added by experts; what down is given
    streams = 2 * (1 + (method == "brecq") + parallel)
    return {
        "streams": streams * 4 * tokens * shape.hidden,
        "block": 4 * tokens * max(2 * shape.query_width, mixed, mlp),
    }


def spilled_bytes(shape: Shape, activations: int, budget: int, itemsize: int, changed: int = 2) -> int:
    """What lies in files while a run works: activations beyond the budget, and `changed` of embedding and head."""
    return max(0, activations - budget) + changed * shape.vocabulary * shape.hidden * itemsize


def disk_bytes(job: Job, tokens: int) -> int:
    """An upper estimate of what a run on so many calibration tokens needs on disk: blocks, model, what is spilled."""
    s, itemsize = job.decoder.shape, job.checkpoint.dtype.itemsize
    tied = stays_tied(job.recipe, job.rotations, job.decoder)
    model = sum(stored_bytes(job.decoder, job.spec, itemsize, tied=tied).values())
    parallel = job.decoder.family.parallel
    options: dict[str, Any] = {"parallel": parallel, "mixed": Sizes.of(job.decoder).mixed}
    activations = sum(activation_bytes(s, tokens, job.recipe.weights.method, **options).values())
    changed = changed_outer_layers(job.recipe, job.rotations, job.decoder)
    return 2 * model + spilled_bytes(s, activations, job.buffers.budget, itemsize, changed) + OTHERS


def collected(p: Stack) -> float:
    """Bytes of a problem's statistics, of a batch and of all (float64): H_in, and c^2 or r c for its target."""
    return (FLOAT + DOUBLE) * (
        p.hessians * p.columns**2 + (p.columns**2 if p.shift == "residual" else p.all_rows * p.columns)
    )


def solver(p: Stack, run: Plan) -> float:
    """Bytes of one problem where most are, beside its statistics.

    Hessians: as mirrored (4), damped (8); then while they are factored damped and permuted (8), two copies (16) and in
    float32 (4). Rows: weight, target, work, result (4 each, 1); the shift in float64 three times (24). Other starts:
    target, work, E H_in, (I - z) H_in, integers, steps, products and losses, 4 each for every start, and Hessians again
    where heads have their own.
    """
    square = float(p.hessians * p.columns**2)
    rows = p.all_rows * p.columns
    if run.settings.method == "rtn":
        return 4 * FLOAT * rows
    held = (FLOAT + DOUBLE) * square + 3 * FLOAT * rows
    targets = held + DOUBLE * square + 3 * DOUBLE * rows
    factored = held + (3 * DOUBLE + FLOAT) * square + 2 * FLOAT * rows
    more = max(run.settings.starts - 1, 0)
    again = DOUBLE * square * more if p.hessians > 1 else 0.0
    many = square * max(more, 1) if p.hessians > 1 else square
    kept = held + again + (2 * FLOAT * many if run.settings.refine else 0)
    refined = kept + 10 * FLOAT * rows * max(more, 1)
    return max(targets, factored, held + again + (3 * DOUBLE + FLOAT) * many + 4 * FLOAT * rows * more, refined)


def _beside(kind: Sizes) -> int:
    """Numbers of a token that what is before the MLP has at once: what its layers put out, its output twice, a norm."""
    *layers, output = before_mlp(kind)
    return sum(p.all_rows for p in layers) + 2 * output.columns + kind.shape.hidden


def footprint(sizes: Sizes, run: Plan, itemsize: int = 2) -> Footprint:
    """What a run holds by stage; `itemsize` is that of the checkpoint's dtype."""
    s, weights = sizes.shape, sizes.block_weights
    batch = min(run.batch, run.samples) * run.length
    both = 2 * FLOAT * weights
    solved = held = 0.0
    for kind in sizes.kinds():
        attention = list(before_mlp(kind))
        mlp = [p for p in problems(kind) if p not in attention]
        statistics = {p.name: sum(map(collected, half)) for half in (attention, mlp) for p in half}
        held = max(held, *statistics.values())
        solved = max(solved, *(statistics[p.name] + solver(p, run) for p in problems(kind)))
    ffn = max(k.shape.ffn * k.routed + k.shape.shared_ffn for k in sizes.kinds())
    wide = max(4 * ffn, *(_beside(kind) for kind in sizes.kinds()))
    moving = FLOAT * batch * (wide + 4 * s.hidden)
    if s.experts:
        moving = FLOAT * batch * (wide + 6 * s.hidden)
    outer = s.vocabulary * s.hidden
    logits = 4 * FLOAT * run.length * s.vocabulary
    window = FLOAT * min(run.batch, max(run.windows, 1)) * run.length * (wide + 2 * s.hidden)
    models = 3 if run.baseline else 2
    logits += models * FLOAT * run.windows * run.length * s.hidden  # their last hidden states
    return Footprint(
        rotation=(itemsize + 2 * DOUBLE + FLOAT) * weights,
        forward=both + moving + held,
        solver=both + solved,
        evaluation=FLOAT * weights + outer * (FLOAT + (1 if sizes.tied else 2) * itemsize) + max(logits, window),
    )
