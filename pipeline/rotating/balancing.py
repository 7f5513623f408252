"""The scales of `rotation.scale`: measured along the plain forward pass, kept in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from ...boa.online.attention import set_attention
from ...rotation.balance import balanced_sites, moments, scales
from ...rotation.rotate import Rotations
from ..job.job import Job
from ..job.sharing import shared_tensors
from ..storage.atomic import write_tensors

SCALES = "scales.safetensors"
TOKENS = 16_384  # that moments are averages over: of the first sequences, which are at random places of the text


class Balance:
    """Finds the scales of each block, on the first rank."""

    def __init__(self, job: Job, length: int) -> None:
        self.job, self.sequences = job, -(-TOKENS // length)
        self.found: list[dict[str, Tensor]] = []
        self.keys, self.centered = job.recipe.cache.key_bits < 16, job.spec.cache_center

    @property
    def rotations(self) -> Rotations:
        """Those of the job, with the scales found so far."""
        return replace(self.job.rotations, scales=tuple(self.found))

    def add(self, index: int, tensors: Mapping[str, Tensor], block: nn.Module, hidden: Tensor) -> None:
        """Block `index` of the checkpoint, its `tensors`, and the stream (sequences, length, hidden) at its start."""
        compute, batch = self.job.decoder, self.job.recipe.calibration.batch
        family, shape = compute.family.at(index), compute.shape.at(index)
        sites = balanced_sites(family, compute.config, folded=self.job.rotations.turned, keys=self.keys)
        seen = moments(compute, block, hidden[: self.sequences], sites, batch, set_attention, centered=self.centered)
        rotary = compute.position_embeddings(1, index)[0].shape[-1]
        self.found.append(scales(tensors, family, shape, seen, rotary))

    def write(self, folder: Path) -> None:
        """Keep them in the folder of the run."""
        write_tensors(folder / SCALES, {f"{i}.{site}": t for i, of in enumerate(self.found) for site, t in of.items()})


def balanced(job: Job, folder: Path) -> Job:
    """The job with the scales, on every rank, that are kept in the folder of its run; none where none are asked for."""
    if not job.recipe.rotation.scale:
        return job
    kept = shared_tensors(job.ranks, lambda: load_file(folder / SCALES))
    found: list[dict[str, Tensor]] = [{} for _ in range(job.decoder.shape.blocks)]
    for name, scale in kept.items():
        index, _, site = name.partition(".")
        found[int(index)][site] = scale
    return job.rotated(scales=found)
