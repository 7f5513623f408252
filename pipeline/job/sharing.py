"""What ranks share of a run: its texts, the folder that the first of them writes, and the tensors in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ...boa.ranks import Ranks
from ...errors import InputError
from ...export.writing import packed_matrices, read_outer_layers
from ...models.outer_layers import OuterLayers
from ..ranks import launch
from ..recipe.fields import kept_recipe
from ..recipe.recipe import Recipe
from ..storage.manifest import Manifest
from ..storage.run_folder import RunFolder, recipe_of
from ..storage.run_writer import FollowedRun
from .identity import identity
from .job import Job


def followed(ranks: Ranks, folder: FollowedRun | None, path: Path) -> FollowedRun:
    """The folder of a run at work on every rank, of that on the first, which alone may write."""
    manifest = shared_manifest(ranks, folder)
    return folder if folder is not None else FollowedRun(path, manifest)


def shared_manifest(ranks: Ranks, folder: RunFolder | None) -> Manifest:
    """The manifest of a run folder, which the first rank has."""
    data = ranks.broadcast_value(None if folder is None else folder.manifest.to_json())
    return folder.manifest if folder is not None else Manifest.model_validate(data)


def shared_recipe(ranks: Ranks, run: Path) -> Recipe:
    """The recipe of a run folder, which the first rank reads."""
    recipe = recipe_of(run) if ranks.rank == 0 else None
    data = ranks.broadcast_value(None if recipe is None else recipe.model_dump(mode="json"))
    return recipe or kept_recipe(data)


def shared_tokens(ranks: Ranks, load: Callable[[], Tensor]) -> Tensor:
    """Tokens that the first rank loads."""
    return shared_tensors(ranks, (lambda: {"tokens": load()}) if ranks.rank == 0 else None)["tokens"]


def shared_tensors(ranks: Ranks, load: Callable[[], dict[str, Tensor]] | None) -> dict[str, Tensor]:
    """Tensors on the CPU by name, that the first rank loads; only its `load` is called."""
    tensors = load() if load is not None and ranks.rank == 0 else {}
    form = ranks.broadcast_value(
        [(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()]
    )
    if ranks.rank > 0:
        tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, shape, dtype in form}
    ranks.broadcast(list(tensors.values()))
    return tensors


def shared_block(job: Job, folder: RunFolder, index: int) -> dict[str, Tensor]:
    """The tensors of a finished block, which the first rank reads."""
    if job.ranks.size == 1:
        return folder.read_block(index)
    return shared_tensors(job.ranks, lambda: folder.read_block(index))


def shared_outer_layers(job: Job, folder: RunFolder) -> OuterLayers:
    """What is outside the blocks of the exported model, which the first rank reads."""
    family = job.decoder.family
    if job.ranks.size == 1:
        return read_outer_layers(folder.path / "model", family)
    found = shared_tensors(job.ranks, lambda: read_outer_layers(folder.path / "model", family).named(family))
    return OuterLayers.of(family, packed_matrices(found, family, job.spec))


def check_alike(job: Job) -> None:
    """Check that every rank has the same versions and a checkpoint of the same files.

    Raises:
        InputError: one has not.
    """
    facts: dict[str, str | int] = {f"version of {name}": version for name, version in identity(job).versions.items()}
    facts |= {f"size of {file.name}": file.stat().st_size for file in job.checkpoint.files}
    found = job.ranks.gather({"host": launch.host(), "facts": facts})
    for rank, other in enumerate(found):
        theirs, first = other["facts"], found[0]["facts"]
        if differing := sorted(name for name in theirs | first if theirs.get(name) != first.get(name)):
            raise InputError(
                f"rank {rank} ({other['host']}) has another {differing[0]} than rank 0: "
                "install the same versions, and copy the same checkpoint, on every machine."
            )


def own_share(job: Job, count: int) -> range:
    """The calibration sequences of this rank, of `count` in all.

    Raises:
        InputError: a rank has none.
    """
    batch = job.recipe.calibration.batch
    shares = job.ranks.shares(count, batch)
    if empty := [rank for rank, share in enumerate(shares) if not share]:
        batches = f", in batches of {batch}," if job.ranks.deterministic else ""
        smaller = ", or a smaller --calibration.batch" if job.ranks.deterministic else ""
        raise InputError(
            f"{count} calibration sequences{batches} leave rank {empty[0]} of {job.ranks.size} without work: "
            f"start fewer ranks, or give more --calibration.samples{smaller}."
        )
    return shares[job.ranks.rank]


def own_windows(job: Job, count: int) -> range:
    """The windows of text that this rank measures, of `count` in all; perhaps none."""
    return job.ranks.shares(count, job.recipe.calibration.batch)[job.ranks.rank]
