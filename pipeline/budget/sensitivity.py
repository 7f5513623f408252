"""What rounding the layers of one site costs the model, for each number of bits, without backpropagation.

The layers that read one input in one block are a unit: runtimes fuse them, and they share their bits. A unit alone is
rounded by plain GPTQ to a middle number of bits, on some of the calibration text, and on a few other tokens the
divergence of the model's predictions from those of full precision is measured, by running what comes after it. That of
other bits is taken to rise as the unit's own error does there, tr(E H_in E^T): near full precision a divergence is a
quadratic form. On the tokens that it was rounded by, a layer of many inputs would lose next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...boa.objective.statistics import InputStatistics
from ...boa.solver.rounding import quantize
from ...models.families import ALL_SITES, Family
from ...models.outer_layers import OuterLayers
from ..console.progress import Progress
from ..job.job import Job
from ..measure.sources import exact_block, only, switch

TOKENS = 1024  # that divergences are measured on
LEARNED = 8192  # others that units are rounded by
QUICK: dict[str, Any] = {"method": "gptq", "alpha": 0.0, "refine": 1, "starts": 1, "tabu": 0.0}
LENGTH = 512  # of a sequence of them, at most


class Unit(NamedTuple):
    """The quantized layers of one site of one block, by their names inside it, and what they cost by bits, in nats."""

    block: int
    site: str
    layers: tuple[str, ...]
    costs: dict[int, float]


@torch.no_grad()
def measure_units(
    job: Job,
    tokens: Tensor,
    outer: OuterLayers,
    wanted: Callable[[int, str], bool],
    bits: Sequence[int],
    progress: Progress,
) -> list[Unit]:
    """The units of a job's layers that are `wanted`, by block and name, and what they cost.

    Args:
        job: whose rotations and balance are known.
        tokens: (sequences, length), of which the first are taken.
        outer: what is outside the blocks, rotated.
        wanted: which layers.
        bits: for which costs are wanted, rising.
    """
    compute, batch = job.decoder, job.recipe.calibration.batch
    length = min(LENGTH, tokens.shape[1])
    judged = -(-TOKENS // length)
    others = tokens[judged : judged - (-LEARNED // tokens.shape[1])]
    tokens = tokens[:judged, :length]
    logits = compute.logits(outer)
    blocks = [_exact(job, index) for index in range(compute.shape.blocks)] if _fits(job) else None

    def block(index: int) -> nn.Module:
        return _exact(job, index) if blocks is None else blocks[index]

    def after(index: int, hidden: Tensor) -> Tensor:
        for later in range(index + 1, compute.shape.blocks):
            hidden = _run(job, block(later), hidden, batch)
            job.ranks.tick()
        return hidden

    def embedded(ids: Tensor) -> Tensor:
        return torch.cat([compute.embed(outer, row[None]) for row in ids]).to(compute.device)

    progress.stage("sensitivity", compute.shape.blocks)
    hidden, learned = embedded(tokens), embedded(others) if len(others) else None
    exact = _log_probabilities(logits, after(-1, hidden))
    reference = bits[(len(bits) - 1) // 2]
    units = list[Unit]()
    for index in range(compute.shape.blocks):
        own = block(index)
        family = compute.family.at(index)
        names = [name for name in family.sites if wanted(index, name)]
        moved, seen = _observed(job, own, family, names, hidden)
        learned, known = (None, seen) if learned is None else _observed(job, own, family, names, learned)
        for site in ALL_SITES:
            layers = tuple(name for name in names if family.sites[name] == site)
            if layers:
                errors, weights = _rounded(job, own, layers, known, seen, bits, rtn=learned is None)
                with _Replaced(own, weights[reference]):
                    divergence = _divergence(exact, logits, after(index, _run(job, own, hidden, batch)))
                ratio = {b: errors[b] / max(errors[reference], 1e-30) for b in bits}
                units.append(Unit(index, site, layers, {b: divergence * ratio[b] for b in bits}))
        hidden = moved
        progress.advance(block=index)
    return units


def _fits(job: Job) -> bool:
    """Whether all blocks may be held in memory: then each is read and rotated once."""
    compute = job.decoder
    numbers = sum(tensor.numel() for tensor in compute.shapes.values())
    return numbers * compute.dtype.itemsize <= job.buffers.budget


def _exact(job: Job, index: int) -> nn.Module:
    """Block `index`, rotated and in full precision, with rotations that run online and no quantizer."""
    block = exact_block(job, index, job.checkpoint.block(index))
    transforms = job.spec.transforms(job.decoder.shape, job.decoder.family, index)
    switch(block, job.decoder.family.at(index), only(transforms, None))
    return block


def _run(job: Job, block: nn.Module, hidden: Tensor, batch: int) -> Tensor:
    return torch.cat([job.decoder.run(block, part) for part in hidden.split(batch)])


def _observed(
    job: Job, block: nn.Module, family: Family, names: Sequence[str], hidden: Tensor
) -> tuple[Tensor, dict[str, InputStatistics]]:
    """What a block puts out, and the inputs of its layers; of one site shared but for experts and latents."""
    first = {family.sites[name]: name for name in reversed(names)}
    apart = family.experts or family.latents
    statistics = {name: InputStatistics() for name in (names if apart else first.values())}
    hooks = [block.get_submodule(name).register_forward_pre_hook(_seen(found)) for name, found in statistics.items()]
    moved = _run(job, block, hidden, job.recipe.calibration.batch)
    for hook in hooks:
        hook.remove()
    return moved, {name: statistics.get(name, statistics[first[family.sites[name]]]) for name in names}


def _rounded(
    job: Job,
    block: nn.Module,
    layers: Sequence[str],
    known: Mapping[str, InputStatistics],
    seen: Mapping[str, InputStatistics],
    bits: Sequence[int],
    *,
    rtn: bool,
) -> tuple[dict[int, float], dict[int, dict[str, Tensor]]]:
    """By bits the weights of layers, rounded by what is `known` of their inputs, and their error on what is `seen`."""
    errors, weights = dict.fromkeys(bits, 0.0), {b: dict[str, Tensor]() for b in bits}
    for name in layers:
        weight = block.get_parameter(f"{name}.weight").data
        if known[name].h_in is None or seen[name].h_in is None:  # an expert that saw no token
            continue
        goal, judge = known[name].objective(), seen[name].objective()
        for b in bits:
            settings = job.settings.but(**QUICK, bits=b)
            found = quantize(weight.float()[None], goal, settings.but(method="rtn") if rtn else settings).dequantize()
            errors[b] += float(judge.loss(found - weight.float()[None]).sum())
            weights[b][name] = found[0].to(weight)
    return errors, weights


def _seen(statistics: InputStatistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        statistics.add(None, arguments[0])

    return hook


class _Replaced:
    """Other weights of a block, for a while."""

    def __init__(self, block: nn.Module, weights: dict[str, Tensor]) -> None:
        self.block, self.weights = block, weights

    def _swap(self) -> None:
        for name, weight in self.weights.items():
            parameter = self.block.get_parameter(f"{name}.weight")
            self.weights[name], parameter.data = parameter.data, weight

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()


def _log_probabilities(logits: Callable[[Tensor], Tensor], hidden: Tensor) -> list[Tensor]:
    return [logits(row).float().log_softmax(-1) for row in hidden]


def _divergence(exact: list[Tensor], logits: Callable[[Tensor], Tensor], hidden: Tensor) -> float:
    """Mean over tokens of KL(exact || what `hidden` predicts)."""
    total, count = 0.0, 0
    for expected, row in zip(exact, hidden, strict=True):
        found = logits(row).float().log_softmax(-1)
        total += float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
        count += len(row)
    return max(total / count, 0.0)
