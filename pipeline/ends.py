"""What is outside the blocks, embedding, final norm and output layer, on its way through a run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..boa.objective import is_finite
from ..boa.statistics import InputStatistics
from ..errors import RunError
from ..models.ends import Ends
from .job import Job


def rotated_ends(job: Job) -> Ends:
    """What is outside the blocks, rotated, in the checkpoint's dtype: what is stored is what is measured."""
    c, family, rotations = job.checkpoint, job.decoder.family, job.rotations
    if not (family.positions or family.layer_norm or rotations.online_r1):
        final = c.final_norm()
        _, norm = rotations.rotate_head(final[None], final, family)
        embedding = _rotated(job, f"{family.embedding}.weight", rotations.rotate_embedding)
        head = _rotated(job, c.head_name, lambda part: rotations.rotate_head(part, final, family)[0])
        return Ends(embedding, norm.to(c.dtype), head)
    return rotations.rotate_ends(c.ends(), family).map(lambda tensor: tensor.to(c.dtype))


def _rotated(job: Job, name: str, rotate: Callable[[Tensor], Tensor]) -> Tensor:
    """A matrix of the checkpoint, rotated some rows at a time (in float64), in a file."""
    dtype = job.checkpoint.dtype
    result = job.buffers.file(*job.checkpoint.shape(name), dtype=dtype)
    for rows, part in job.checkpoint.rows(name):
        result[rows] = rotate(part).to(dtype)
        if not is_finite(result[rows]):
            raise RunError(
                f"tensor {name} does not fit into {str(dtype).removeprefix('torch.')} once rotated: save it "
                "as bfloat16 or float32."
            )
        job.buffers.release()
    return result


@torch.no_grad()
def corrected_head(job: Job, ends: Ends, full: Tensor, quantized: Tensor) -> Ends:
    """The output layer, which is not quantized, moved to make up for what the last hidden states lost.

    It is the target shift of any projection, W* = W (I + alpha R H_in^-1), with no rounding after it.
    """
    weights = job.recipe.weights
    if weights.head == 0 or weights.method == "rtn":
        return ends
    final, statistics = job.decoder.norm(ends.norm, ends.norm_bias), InputStatistics()
    for f, q in zip(*(stream.split(job.recipe.calibration.batch) for stream in (full, quantized)), strict=True):
        statistics.add(final(f.to(job.decoder.device)), final(q.to(job.decoder.device)))
    objective = statistics.objective().damped(weights.damping)
    for part in ends.head.split(8192):
        moved = objective.target(part.to(job.decoder.device, job.decoder.dtype)[None], weights.head)[0]
        part.copy_(moved)
    return ends
