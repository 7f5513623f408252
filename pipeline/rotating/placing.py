"""Where R1 stands when the recipe leaves it to the model, and a notice where a recipe's own choice does harm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...rotation.placement import HARMFUL, noise_figures
from ..console.progress import Progress
from ..job.job import Job

SEQUENCES = 1  # of the calibration set: the figures of models differ by orders of magnitude


def noise_of_r1(job: Job, tokens: Tensor, progress: Progress) -> float | None:
    """How much louder noise is with R1 merged: the geometric mean of all norms' figures, from a plain pass over few
    tokens (sequences, length). None where the recipe, or the family, has R1 elsewhere.
    """
    if not job.rotations.turned:
        return None
    found = _measured(job, tokens, progress) if job.ranks.rank == 0 else None
    return float(job.ranks.broadcast_value(found))


@torch.no_grad()
def _measured(job: Job, tokens: Tensor, progress: Progress) -> float:
    progress.stage("place R1", job.decoder.shape.blocks)
    compute, logarithms = job.decoder, list[float]()
    with job.timed("place R1"):
        hidden = compute.embed(job.checkpoint.outer_layers(), tokens[:SEQUENCES]).to(compute.device)
        for index in range(compute.shape.blocks):
            tensors = job.checkpoint.block(index)
            block = compute.block(index, tensors)
            logarithms += [math.log(max(f, 1e-300)) for f in noise_figures(compute, tensors, block, hidden)]
            hidden = compute.run(block, hidden)
            progress.advance()
            job.ranks.tick()
    return math.exp(sum(logarithms) / len(logarithms))


def settle(job: Job, noise: float | None) -> Job:
    """The job with R1 where it belongs, once its noise is known: a recipe that leaves it to the model has it merged
    until then.

    Where the recipe itself has it merged, it stays, and a notice says what that costs.
    """
    if noise is None or noise <= HARMFUL:
        return job
    if job.recipe.rotation.r1 == "auto":
        return job.without_r1().with_notices(
            f"R1 is left out: merged, it would make the noise of rounding {noise:.0f} times as strong in this model, "
            "whose norms silence its largest channels. With rotation.r1 online it stands behind the norms."
        )
    return job.with_notices(
        f"Merged R1 makes the noise of rounding {noise:.0f} times as strong in this model, whose norms silence its "
        "largest channels: rotation.r1 online or none does better."
    )
