"""The activations of a model before and after its rotation, measured along the plain forward pass."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ...rotation.outliers import Outliers, site_inputs
from ..job.job import Job
from ..rotating.balancing import Balance
from ..storage.prefetch import for_rotation

ACTIVATIONS = "activations.safetensors"
SEQUENCES = 2  # of the calibration set: figures are averages over their tokens


class ActivationProfile:
    """Looks at the inputs of each block's linear layers while the full-precision model runs.

    The rotated model's residual stream is the rotated stream, exactly: it needs no forward pass of its own. Where
    scales are found along the same pass, `balance` has seen each block before.
    """

    def __init__(self, job: Job, balance: Balance | None = None) -> None:
        self.job, self.balance, self.sequences = job, balance, SEQUENCES
        self.before, self.after = (Outliers(job.decoder.shape.blocks) for _ in range(2))

    def add(self, index: int, tensors: Mapping[str, Tensor], block: nn.Module, hidden: Tensor) -> None:
        """Block `index` of the checkpoint, its `tensors`, and the stream (sequences, length, hidden) at its start."""
        compute = self.job.decoder
        rotations = self.job.rotations if self.balance is None else self.balance.rotations
        hidden = hidden[:SEQUENCES].to(compute.device)
        self.before.add(index, site_inputs(compute, block, hidden))
        near = for_rotation(dict(tensors), compute.device)
        rotated = compute.block(index, rotations.rotate_block(near, compute.family, index))
        turned = rotations.rotate_stream(hidden, compute.family)
        self.after.add(index, site_inputs(compute, rotated, turned, rotations))

    def tensors(self) -> dict[str, Tensor]:
        """What is stored of it, by flat names that begin with `before` and `after`."""
        return self.before.tensors("before") | self.after.tensors("after")
