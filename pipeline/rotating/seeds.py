"""Which seed of the rotations: a few are tried on a little calibration text, before the work starts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...boa.online.transforms import InputTransform
from ...boa.scheme import QuantizationArgs
from ...boa.solver.rounding import quantize
from ...boa.stored_scales import global_scale_of
from ...rotation.rotate import Rotations
from ..console.progress import Progress
from ..job.job import Job

SEQUENCES = 8


def choose_seed(job: Job, tokens: Tensor, progress: Progress) -> int:
    """The seed, among `rotation.seeds` from the recipe's on, whose rotated model loses least to rounding to nearest.

    Args:
        tokens: (sequences, length); the first `SEQUENCES` are used.
    """
    rotation = job.recipe.rotation
    candidates = range(rotation.seed, rotation.seed + rotation.seeds)
    if len(candidates) == 1 or not (job.rotations.turned or rotation.r2):
        return rotation.seed
    progress.stage("choose the rotation", len(candidates))
    costs = {}
    ranks = job.ranks
    with job.timed("choose the rotation"):
        for seed in candidates[ranks.rank :: ranks.size]:
            costs[seed] = rounding_cost(job, job.rotations.reseeded(seed), tokens[:SEQUENCES])
            progress.advance(ranks.size)
            ranks.tick()
        costs = {int(seed): cost for found in ranks.gather(costs) for seed, cost in found.items()}
    return min(candidates, key=costs.__getitem__)


Hook = Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]


@torch.no_grad()
def rounding_cost(job: Job, rotations: Rotations, tokens: Tensor) -> float:
    """Mean over all projections of ||Q(W) q(x) - W x||^2 / ||W x||^2, each by itself on the full-precision stream.

    W is rounded to nearest and x by the quantizer of its site: a proxy that needs one forward pass.
    """
    decoder, family = job.decoder, job.decoder.family
    settings = job.settings.but(method="rtn")
    hidden = torch.cat([_embedded(job, rotations, ids[None]) for ids in tokens]).to(decoder.device)
    costs: list[float] = []

    def measured(transform: InputTransform, args: QuantizationArgs) -> Hook:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            weight: Tensor = module.get_parameter("weight")
            x = transform.rotate(arguments[0])
            exact = nn.functional.linear(x, weight)
            rounded = weight
            if args.quantizes:
                own = settings.of(args, global_scale_of(float(weight.abs().amax())))
                rounded = quantize(weight[None], None, own).dequantize()[0]
            given = x if transform.quantizer is None else transform.quantizer(x)
            lost = nn.functional.linear(given, rounded) - exact
            costs.append(float(lost.square().sum() / exact.square().sum().clamp_min(1e-30)))
            return (x, *arguments[1:])

        return hook

    for index in range(decoder.shape.blocks):
        block = decoder.block(index, rotations.rotate_block(job.checkpoint.block(index), family, index))
        schemes = job.spec.schemes(family, index)
        transforms = job.spec.transforms(decoder.shape, family, index)
        for name, transform in transforms.by_projection(family.at(index)).items():
            block.get_submodule(name).register_forward_pre_hook(measured(transform, schemes[name].weights))
        for part in hidden.split(job.recipe.calibration.batch):
            part.copy_(decoder.run(block, part))
    return sum(costs) / len(costs)


def _embedded(job: Job, rotations: Rotations, ids: Tensor) -> Tensor:
    """(1, length) token ids -> (1, length, hidden) by the rotated embedding; only their rows of it are rotated."""
    known, places = ids.unique(return_inverse=True)
    outer = rotations.rotate_outer_layers(job.checkpoint.outer_layers().rows(known), job.decoder.family)
    return job.decoder.embed(outer, places)
