"""What is outside the blocks, embedding, final norm and output layer, on its way through a run."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..boa.objective import is_finite
from ..boa.statistics import InputStatistics
from ..boa.totals import Total
from ..errors import RunError
from ..models.ends import Ends
from ..models.matrices import SPAN, spans
from .job import Job


def rotated_ends(job: Job) -> Ends:
    """What is outside the blocks, rotated, in the checkpoint's dtype: what is stored is what is measured.

    Rows of embedding and head are rotated some at a time (in float64), into files.

    Raises:
        RunError: values do not fit into the dtype.
    """
    source, family, dtype = job.checkpoint.ends(), job.decoder.family, job.checkpoint.dtype
    embedding, head = (job.buffers.file(*source.embedding.shape, dtype=dtype) for _ in range(2))
    biases: list[Tensor] = []
    for rows in spans(source.head):
        part = job.rotations.rotate_ends(source.rows(rows), family).map(lambda tensor: tensor.to(dtype))
        for name, tensor in part.named(family).items():
            if not is_finite(tensor):
                raise RunError(
                    f"tensor {name} does not fit into {str(dtype).removeprefix('torch.')} once rotated: save it "
                    "as bfloat16 or float32."
                )
        embedding[rows], head[rows] = part.embedding[:], part.head[:]
        biases += [] if part.head_bias is None else [part.head_bias]
        job.release()
    return replace(part, embedding=embedding, head=head, head_bias=torch.cat(biases) if biases else None)


@torch.no_grad()
def corrected_head(job: Job, ends: Ends, full: Tensor, quantized: Tensor) -> Ends:
    """The output layer, which is not quantized, moved to make up for what the last hidden states lost.

    It is the target shift of any projection, W* = W (I + alpha R H_in^-1), with no rounding after it.
    """
    weights = job.recipe.weights
    if weights.head == 0 or weights.method == "rtn":
        return ends
    final, batch = job.decoder.norm(ends.norm, ends.norm_bias), job.recipe.calibration.batch
    shares = job.ranks.shares(job.recipe.calibration.samples, batch)
    batches = [range(share.start // batch, -(-share.stop // batch)) for share in shares]
    statistics, first = Total(InputStatistics, job.ranks, batches), shares[job.ranks.rank].start
    for i, (f, q) in enumerate(zip(*(stream.split(batch) for stream in (full, quantized)), strict=True)):
        statistics.at(first // batch + i).add(final(f.to(job.decoder.device)), final(q.to(job.decoder.device)))
        job.release()
    objective = statistics.value().objective().damped(weights.damping)
    if job.ranks.rank > 0:
        return ends  # the first rank writes them
    for rows in spans(ends.head, 4 * SPAN):  # the Hessian is factored anew for each
        part = ends.head[rows]
        moved = objective.target(part.to(job.decoder.device, job.decoder.dtype)[None], weights.head)[0]
        part.copy_(moved)
        job.buffers.release()
    return ends
