"""What the rotation did to the activations, in numbers: how spiky the inputs of the linear layers are, block by block.

A token is quantized with one scale, which its largest channel sets: the closer a token is to a Gaussian, the finer the
steps. Measured is, for each token's vector x of c channels, averaged over tokens:

| figure | formula | Gaussian |
|---|---|---|
| kurtosis | mean((x - m)^4) / mean((x - m)^2)^2, m its mean | 3 |
| peak | max abs(x) / sqrt(mean(x^2)) | sqrt(2 ln c), about |

QuaRot (arXiv 2404.00456, figure 1) shows the magnitudes by token and channel; kurtosis is the measure of KurTail
(arXiv 2503.01483).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..models.decoder import Decoder
from ..models.families import SITES
from .hadamard import Hadamard
from .rotate import Rotations, before_output

GRID = (64, 128)  # tokens and channels of a picture, at most
PICTURES = 8  # blocks of which pictures are kept, at most


def pictured_blocks(blocks: int) -> list[int]:
    """The blocks of which pictures are kept: all, or `PICTURES` of them evenly spread, the first and last included."""
    if blocks <= PICTURES:
        return list(range(blocks))
    return [round(i * (blocks - 1) / (PICTURES - 1)) for i in range(PICTURES)]


@torch.no_grad()
def site_inputs(
    decoder: Decoder, block: nn.Module, hidden: Tensor, rotations: Rotations | None = None
) -> dict[str, Tensor]:
    """The input of each site in one plain run of a block: (batch, length, c) by the names of `SITES`.

    Args:
        decoder: runs the block.
        block: the block; folded and rotated where `rotations` are given.
        hidden: (batch, length, hidden), the residual stream at its start; not changed.
        rotations: those of a rotated block, whose online ones (R1 behind the norm, heads, R4) turn the inputs as it
            runs. R3 is left out: it changes nothing but queries and keys.
    """
    family = decoder.family_of(block)
    read = {family.attention_inputs[0]: "qkv", family.output: "output"}
    read |= {family.gate or family.up: "gate_up", family.down: "down"}
    online: dict[str, Hadamard | None] = {}
    if rotations is not None:
        r1 = rotations.r1 if rotations.online_r1 else None
        heads = before_output(family, decoder.shape) if rotations.heads else None
        by_site = {"qkv": r1, "output": heads, "gate_up": r1}
        online = {name: by_site.get(site) for name, site in family.sites.items()}
        online |= {name: rotations.r4_of(block.get_parameter(f"{name}.weight").shape[1]) for name in family.downs}
    found: dict[str, Tensor] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            rotation = online.get(name)
            x = args[0] if rotation is None else rotation.apply(args[0])
            if name in read:
                found[read[name]] = x.reshape(*hidden.shape[:2], -1)  # OPT's MLP sees tokens without sequences
            return x

        return hook

    named = {*read, *online}
    handles = [module.register_forward_pre_hook(look(name)) for name, module in block.named_modules() if name in named]
    try:
        decoder.run(block, hidden.to(decoder.device, decoder.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return found


def kurtosis(x: Tensor) -> Tensor:
    """Of each vector along the last dimension, (..., c) -> (...); 0 for a constant one."""
    centred = (x - x.mean(-1, keepdim=True)).double()
    square = centred.square()
    return square.square().mean(-1) / square.mean(-1).square().clamp_min(torch.finfo(torch.float64).tiny)


def peak(x: Tensor) -> Tensor:
    """The largest magnitude over the root mean square, (..., c) -> (...); 0 for a zero vector."""
    wide = x.double()
    return wide.abs().amax(-1) / wide.square().mean(-1).sqrt().clamp_min(torch.finfo(torch.float64).tiny)


def magnitudes(x: Tensor) -> Tensor:
    """abs(x), (tokens, c), as a picture of at most `GRID`: each pixel is the largest of those that it covers."""
    size = tuple(min(most, given) for most, given in zip(GRID, x.shape, strict=True))
    return functional.adaptive_max_pool2d(x.abs().float()[None], size)[0]


class Outliers:
    """Collects the figures and pictures of one model, before or after its rotation.

    Attributes:
        figures: (blocks, sites) for `kurtosis` and `peak`; NaN where a block has no such site.
        pictures: `magnitudes` of the first sequence by (site, block).
        sizes: tokens and channels that a site's pictures cover.
    """

    def __init__(self, blocks: int) -> None:
        self.figures = {name: torch.full((blocks, len(SITES)), torch.nan) for name in ("kurtosis", "peak")}
        self.pictures: dict[tuple[str, int], Tensor] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self._pictured = set(pictured_blocks(blocks))

    def add(self, index: int, inputs: Mapping[str, Tensor]) -> None:
        """The site inputs of block `index`, each (batch, length, c)."""
        for site, x in inputs.items():
            column = SITES.index(site)
            for name, measure in (("kurtosis", kurtosis), ("peak", peak)):
                # One sequence at a time: the wide copies of a large model's are large.
                self.figures[name][index, column] = torch.stack([measure(part).mean() for part in x]).mean().float()
            if index in self._pictured:
                self.pictures[site, index] = magnitudes(x[0]).cpu()
                self.sizes[site] = (x.shape[1], x.shape[2])

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All of it by flat names: `<prefix>.kurtosis`, `<prefix>.picture.<site>.<block>`, `<prefix>.size.<site>`.

        Pictures are in float16.
        """
        largest = torch.finfo(torch.float16).max
        pictures = {
            f"{prefix}.picture.{site}.{index}": picture.clamp_max(largest).half()
            for (site, index), picture in self.pictures.items()
        }
        sizes = {f"{prefix}.size.{site}": torch.tensor(size) for site, size in self.sizes.items()}
        return {f"{prefix}.{name}": values for name, values in self.figures.items()} | pictures | sizes
