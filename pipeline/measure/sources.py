"""Where the loss comes from: what each quantizer of a finished run costs alone, all else in full precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...boa.online.attention import set_attention
from ...boa.online.transforms import FOUND, OnlineTransforms
from ...eval.perplexity import States, part_sums, summary
from ...eval.results import Sources
from ...export.packing import ALL_PARTS, unpack_block
from ...models.families import ALL_SITES, Family
from ...models.outer_layers import OuterLayers
from ..console.progress import Progress
from ..estimate.counting import SOURCE_WINDOWS
from ..job.job import Job
from ..job.sharing import own_windows, shared_block
from ..rotating.outside_blocks import rotated_outer_layers
from ..storage.buffers import trim
from ..storage.prefetch import for_rotation
from ..storage.run_folder import RunFolder

PACKED = ("weights", "all")  # sources that run the run's own weights


def source_names(job: Job) -> list[str]:
    """The sources of the blocks of a job, `all` last.

    `weights`, the inputs `qkv`, `output`, `gate_up`, `down` and `latent`, `keys`, `values`: those that are quantized.
    """
    shape, family = job.decoder.shape, job.decoder.family
    blocks = [job.spec.transforms(shape, family, index) for index in range(shape.blocks)]
    sites = [site for site in ALL_SITES if any(getattr(block, site).quantizer is not None for block in blocks)]
    cache = {"keys": "key", "values": "value"}
    cached = [n for n, part in cache.items() if any(getattr(b.attention, part) is not None for b in blocks)]
    return ["weights", *sites, *cached, "all"]


def only(transforms: OnlineTransforms, source: str | None) -> OnlineTransforms:
    """All rotations, and the quantizers of `source` alone: none of `weights` or None, every one of `all`."""
    if source == "all":
        return transforms
    for site in ALL_SITES:
        if site != source:
            transforms = transforms.with_input(site, replace(getattr(transforms, site), quantizer=None))
    key = transforms.attention.key if source == "keys" else None
    value = transforms.attention.value if source == "values" else None
    return replace(transforms, attention=replace(transforms.attention, key=key, value=value))


@torch.no_grad()
def measure_sources(
    job: Job,
    folder: RunFolder,
    texts: Mapping[str, Tensor],
    outer: OuterLayers,
    progress: Progress,
    most: int = SOURCE_WINDOWS,
) -> Sources:
    """KL from full precision with one quantizer on alone, and what each adds to the residual stream of each block.

    A site is quantized with the clip ratios that the run found for it. The weights are those of the run: what they make
    up for of other quantizers counts against them where they are alone.

    Args:
        job, folder: the run; its blocks are finished, and `job.rotations` and `job.spec` are what it was made with.
        texts: (windows, length) tokens by the name of the data set; the first `most` windows of the first are used.
        ends: what is outside the blocks of the quantized model.
        progress: told of each block.

    Returns:
        By source (`source_names`); what a block adds is taken on the stream that full precision brings in, the mean
        over tokens.
    """
    dataset, text = next(iter(texts.items()))
    windows = text[:most]
    share = own_windows(job, len(windows))
    own = windows[share.start : share.stop]
    walk = _Walk(job, own, outer)
    progress.stage("evaluate sources", job.decoder.shape.blocks)
    with job.timed("evaluate sources"):
        for index in range(job.decoder.shape.blocks):
            packed = shared_block(job, folder, index)
            if len(own):
                walk.block(index, packed)
            trim()
            progress.advance()
            job.ranks.tick()
        original = walk.states("original")
        models = {name: walk.states(name) for name in ("exact", *walk.names)}
        gathered, kl = job.ranks.gather(part_sums(own, models, original, advance=job.ranks.tick)), {}
        for name in models:
            _, found = summary([part for rank in gathered for part in rank[name]], windows.numel() - len(windows), True)
            assert found is not None
            kl[name] = found.kl
        errors = job.ranks.gather(walk.errors)
    blocks = {
        name: tuple(sum(sum(rank[name][index]) for rank in errors) / len(windows) for index in range(len(of_blocks)))
        for name, of_blocks in walk.errors.items()
    }
    exact = kl.pop("exact")
    return Sources(kl=kl, exact=exact, blocks=blocks, dataset=dataset, tokens=(len(windows), windows.shape[1]))


class _Walk:
    """The streams of all sources on their way through the blocks, and the errors found at each block's end.

    Attributes:
        names: the sources.
        streams: (windows, length, hidden) by source, of the `original` model, and of the `exact` one, rotated.
        ends: what is outside the blocks of each.
        errors: by source, block and window.
    """

    def __init__(self, job: Job, own: Tensor, outer: OuterLayers) -> None:
        compute = job.decoder
        self.job, self.own = job, own
        self.names = source_names(job)
        # Moving the head is a part of what is done about the weights.
        moved = bool(job.recipe.weights.head) and job.recipe.weights.method != "rtn"
        exact = rotated_outer_layers(job) if moved else outer
        self.outer = {name: outer if name in PACKED else exact for name in ("exact", *self.names)}
        self.outer["original"] = job.checkpoint.outer_layers()
        self.streams: dict[str, Tensor] = {}
        for name, outside in self.outer.items():
            stream = job.buffers.empty(*own.shape, compute.shape.hidden, dtype=compute.dtype)
            for part, ids in zip(stream.split(self.batch), own.split(self.batch), strict=True):
                if len(ids):
                    part.copy_(compute.embed(outside, ids))
            self.streams[name] = stream
        self.errors: dict[str, list[list[float]]] = {
            name: [[] for _ in range(compute.shape.blocks)] for name in self.names
        }

    @property
    def batch(self) -> int:
        """Windows computed at a time."""
        return self.job.recipe.calibration.batch

    def block(self, index: int, packed: dict[str, Tensor]) -> None:
        """Move all streams through block `index`; `packed` has its quantized tensors."""
        compute, family = self.job.decoder, self.job.decoder.family.at(index)
        tensors = self.job.checkpoint.block(index)
        original = compute.block(index, tensors)
        for part in self.streams["original"].split(self.batch):
            part.copy_(compute.run(original, part.to(compute.device)))
        del original
        exact = exact_block(self.job, index, tensors)
        transforms = own_transforms(self.job, index, packed)
        quantized = unpacked_block(self.job, index, packed)
        for start in range(0, len(self.own), self.batch):
            span = slice(start, start + self.batch)
            before = self.streams["exact"][span].to(compute.device)
            switch(exact, family, only(transforms, None))
            after = compute.run(exact, before)
            for name in self.names:
                block, stream = quantized if name in PACKED else exact, self.streams[name][span]
                switch(block, family, only(transforms, name))
                self.errors[name][index] += _errors(compute.run(block, before), after)
                stream.copy_(compute.run(block, stream.to(compute.device)))
            self.streams["exact"][span] = after.to(self.streams["exact"].device)
            self.job.release()

    def states(self, name: str) -> States:
        """The last hidden states of a source, once all blocks are done."""
        return States(self.streams[name], self.job.decoder.logits(self.outer[name]), self.job.decoder.device)


def exact_block(job: Job, index: int, tensors: dict[str, Tensor]) -> nn.Module:
    """Block `index`, of the checkpoint's `tensors`, rotated and in full precision; `switch` says what runs online."""
    compute = job.decoder
    near = for_rotation(tensors, compute.device)
    rotated = job.rotations.rotate_block(near, compute.family, index)
    return _hooked(compute.block(index, rotated), compute.family.at(index))


def unpacked_block(job: Job, index: int, packed: dict[str, Tensor]) -> nn.Module:
    """Block `index` with the weights of the run as floats; `switch` says what runs online.

    Packed layers would take products of integers, which differ in the rounding of floats alone, and which a processor
    without instructions for them is many times slower at.
    """
    compute, family = job.decoder, job.decoder.family.at(index)
    empty = compute.empty_block(index)
    columns = {name: empty.get_parameter(f"{name}.weight").shape[1] for name in family.projections}
    results = unpack_block(packed, job.spec.schemes(family, index), columns)
    parts = {f"{name}.{part}" for name in results for part in ALL_PARTS}
    others = {n: tensor for n, tensor in packed.items() if n not in parts and n.rpartition(".")[2] not in FOUND}
    weights = {f"{name}.weight": result.dequantize() for name, result in results.items()}
    return _hooked(compute.block(index, others | weights), family)


def own_transforms(job: Job, index: int, packed: Mapping[str, Tensor]) -> OnlineTransforms:
    """The transforms of block `index`, with what calibration found, which is among the tensors `packed`."""
    compute, family = job.decoder, job.decoder.family.at(index)
    transforms = job.spec.transforms(compute.shape, family, index)
    for name, site in family.sites.items():
        own = getattr(transforms, site)
        transforms = transforms.with_input(site, own.scaled(packed.get(f"{name}.{own.scale_name}")))

    def near(name: str) -> Tensor | None:
        found = packed.get(f"{family.attention}.{name}")
        return None if found is None else found.to(compute.device, compute.dtype)

    return replace(transforms, attention=transforms.attention.calibrated(near))


def _hooked(block: nn.Module, family: Family) -> nn.Module:
    for name in family.sites:
        block.get_submodule(name).register_forward_pre_hook(_transformed)
    return block


def _transformed(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    transform: Any = module.transform
    return (transform(arguments[0]), *arguments[1:])


def switch(block: nn.Module, family: Family, transforms: OnlineTransforms) -> None:
    """Put transforms on a block of `exact_block` or `unpacked_block`, in place."""
    for name, transform in transforms.by_projection(family).items():
        block.get_submodule(name).transform = transform  # type: ignore[assignment]
    set_attention(block.get_submodule(family.attention), transforms.attention)


def _errors(found: Tensor, exact: Tensor) -> list[float]:
    """Of each window: the mean over tokens of |h' - h|^2 / |h|^2; both (windows, length, hidden)."""
    size = exact.square().sum(-1).clamp_min(torch.finfo(exact.dtype).tiny)
    part: list[float] = ((found - exact).square().sum(-1) / size).double().mean(-1).tolist()
    return part
