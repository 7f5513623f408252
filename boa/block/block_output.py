"""Learned rounding on the output of a whole block, by backpropagation: BRECQ (arXiv 2102.05426).

`learn_output` is the step of a block; `learn_block` needs no more than the block's output error.

The loss is the mean squared difference of the block's output, given the quantized stream, from the full-precision
stream. All projections are learned at once, from a rounded solution, with the variables, the regulariser and the
schedule of `learned`; only the gradient by a weight comes from autograd instead of from an objective.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...models.decoder import Decoder, stream_of
from ...models.families import ALL_SITES
from ..online.activations import DynamicQuantizer
from ..online.attention import set_attention
from ..online.directions import LeadingDirections
from ..online.float8 import StaticFloat8
from ..online.transforms import OnlineTransforms
from ..solver.learned import Learning, penalty_slope, rectified, side_and_variables, slope_
from ..solver.rounding import Quantized
from ..stopwatch import stage
from .context import BlockContext, BlockResult

TOKENS = 1024  # of one step of Adam
SAMPLE = 4096  # tokens that units and the first direction are measured on
PROBE = 0.25  # of a step of an integer: how far weights are moved to measure the curvature


class _WithGradient:
    """A quantizer whose gradient is that of the identity; before the class of the quantizer."""

    def __call__(self, x: Tensor) -> Tensor:
        plain = x.detach()
        return x + (super().__call__(plain) - plain)  # type: ignore[misc]


class StraightThrough(_WithGradient, DynamicQuantizer):
    """As `DynamicQuantizer`, with the gradient of the identity."""


class StraightThroughDirections(_WithGradient, LeadingDirections):
    """Likewise, as `LeadingDirections`."""


class StraightThroughFloat8(_WithGradient, StaticFloat8):
    """Likewise, as `StaticFloat8`."""


@dataclass
class Rounded:
    """One projection: integers (r, c) of `bits`, scale and zero (r, groups), as in `rounding.Quantized`."""

    integers: Tensor
    scale: Tensor
    zero: Tensor
    bits: int


@stage("refinement")
def learn_output(context: BlockContext, results: Mapping[str, Quantized], given: Tensor, wanted: Tensor) -> BlockResult:
    """All projections on the output of the block, from what the other steps found.

    Args:
        context: of the block, whose weights are not changed.
        results: where it starts; scales and zero points stay.
        given: (sequences, length, hidden), what the block reads in the quantized stream.
        wanted: (sequences, length, hidden), what it puts out in the full-precision one.
    """
    settings = context.settings
    output = BlockOutput(context.decoder, context.quantized, context.transforms, given, wanted)
    start = {
        name: Rounded(part.integers, part.scale, part.zero, (context.settings_of(name) or settings).bits)
        for name, part in results.items()
    }
    found, before, after = learn_block(output, start, settings.learning, context.share.batch)
    learned = {name: Quantized(found[name], part.scale, part.zero) for name, part in start.items()}
    return BlockResult(learned, output_error=(before, after))


class BlockOutput:
    """The output error of one block as a function of its projections' weights.

    Args:
        decoder: runs the block.
        block: its weights are not changed; what it computes with is given with each call.
        transforms: rotations and quantizers between its layers.
        given: (sequences, length, hidden), what the block reads.
        wanted: (sequences, length, hidden), what it should put out.
    """

    def __init__(
        self, decoder: Decoder, block: nn.Module, transforms: OnlineTransforms, given: Tensor, wanted: Tensor
    ) -> None:
        self.decoder, self.block, self.given, self.wanted = decoder, block, given, wanted
        self.transforms = straight_through(transforms)

    def error(self, weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """The mean over the sequences `rows` and their tokens of the mean squared error; () with a gradient."""
        device = self.decoder.device
        x, wanted = self.given[rows].to(device), self.wanted[rows].to(device)
        named = {f"{name}.weight": weight for name, weight in weights.items()}
        with transformed(self.decoder, self.block, self.transforms):
            arguments = self.decoder.arguments(self.block, x.shape[1])
            output = stream_of(torch.func.functional_call(self.block, named, (x,), arguments))
        return (output - wanted).square().mean(-1).mean()

    def whole(self, weights: Mapping[str, Tensor], batch: int) -> float:
        """The error over all sequences, `batch` at a time."""
        with torch.no_grad():
            parts = torch.arange(len(self.given)).split(batch)
            return sum(float(self.error(weights, rows)) * len(rows) for rows in parts) / len(self.given)

    def gradients(self, weights: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """Of `error`, by each weight."""
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        with torch.enable_grad():
            found = torch.autograd.grad(self.error(leaves, rows), list(leaves.values()), allow_unused=True)
        pairs = zip(leaves.items(), found, strict=True)  # an expert that saw no token has no gradient
        return {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in pairs}

    def units(self, weights: Mapping[str, Tensor], scales: Mapping[str, Tensor], rows: Tensor) -> dict[str, float]:
        """What one step of an integer costs, on average over each projection: s^2 times the error's half curvature.

        With d a step of random sign for every weight, the mean of d^T H d is the sum of H's diagonal (Hutchinson); and
        f(w + p d) + f(w - p d) - 2 f(w) = p^2 d^T H d, up to higher orders.
        """
        generator = torch.Generator().manual_seed(0)
        units = {}
        with torch.no_grad():
            middle = float(self.error(weights, rows))
            for name, weight in weights.items():
                signs = torch.randint(0, 2, weight.shape, generator=generator).to(weight) * 2 - 1
                moved = [weight + way * PROBE * signs * scales[name] for way in (-1, 1)]
                outer = sum(float(self.error({**weights, name: w}, rows)) for w in moved)
                units[name] = max(0.0, outer - 2 * middle) / (2 * PROBE**2 * weight.numel())
        # Where the quantizers of activations hide it, a small part of the others'.
        least = max(1e-3 * max(units.values()), torch.finfo(torch.float32).tiny)
        return {name: max(unit, least) for name, unit in units.items()}


def learn_block(
    output: BlockOutput, start: Mapping[str, Rounded], learning: Learning, batch: int
) -> tuple[dict[str, Tensor], float, float]:
    """The integers of each projection, and the error over all sequences at the start and at the result.

    Args:
        output: the error of the block.
        start: by projection; scales and zero points stay.
        learning: iterations, learning rate, regulariser.
        batch: sequences computed at a time where no gradient is needed.

    Returns:
        uint8 integers, those of the start where the error would rise; the error before; and after.
    """
    sequences, length = output.given.shape[:2]
    scales, zeros = (
        {name: _wide(getattr(r, part), r.integers) for name, r in start.items()} for part in ("scale", "zero")
    )

    def weights(integers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: (q - zeros[name]) * scales[name] for name, q in integers.items()}

    first = {name: rounded.integers.to(scales[name].dtype) for name, rounded in start.items()}
    sample = torch.arange(sequences)[: max(1, SAMPLE // length)]
    units = output.units(weights(first), scales, sample)
    slopes = output.gradients(weights(first), sample)
    base, v, factors = {}, {}, {}
    for name, q in first.items():
        factors[name] = scales[name] / units[name]
        base[name], v[name] = side_and_variables(q, factors[name] * slopes[name] / -2, 2 ** start[name].bits - 1)

    optimizer = torch.optim.Adam(list(v.values()), lr=learning.rate, fused=True)
    for iteration, rows in zip(range(learning.iterations), _batches(sequences, max(1, TOKENS // length)), strict=False):
        h = {name: rectified(variable) for name, variable in v.items()}
        slopes = output.gradients(weights({name: base[name] + part for name, part in h.items()}), rows)
        beta = learning.beta(iteration)
        for name, part in h.items():
            slope = factors[name] * slopes[name]
            if beta is not None:
                slope.add_(penalty_slope(part, beta), alpha=learning.regulariser)
            v[name].grad = slope.mul_(slope_(part))
        optimizer.step()

    found = {name: base[name] + (rectified(variable) >= 0.5) for name, variable in v.items()}
    before, after = (output.whole(weights(integers), batch) for integers in (first, found))
    kept = found if after < before else first
    return {name: q.to(torch.uint8) for name, q in kept.items()}, before, min(before, after)


def straight_through(transforms: OnlineTransforms) -> OnlineTransforms:
    """The same transforms, with a gradient."""

    def pass_through(quantizer: Any) -> Any:
        if isinstance(quantizer, LeadingDirections):
            return StraightThroughDirections(quantizer.rest, quantizer.directions)
        if isinstance(quantizer, StaticFloat8):
            return StraightThroughFloat8(quantizer.scale)
        if not isinstance(quantizer, DynamicQuantizer):
            return quantizer  # which attention passes by itself
        return StraightThrough(*(getattr(quantizer, field.name) for field in fields(DynamicQuantizer)))

    for site in ALL_SITES:
        transform = getattr(transforms, site)
        transforms = transforms.with_input(site, replace(transform, quantizer=pass_through(transform.quantizer)))
    attention = transforms.attention
    key, value = pass_through(attention.key), pass_through(attention.value)
    return replace(transforms, attention=replace(attention, key=key, value=value))


@contextmanager
def transformed(decoder: Decoder, block: nn.Module, transforms: OnlineTransforms) -> Iterator[None]:
    """Let `block` compute with `transforms` between its layers."""
    family, handles = decoder.family_of(block), []
    attention = block.get_submodule(family.attention)
    for name, site in transforms.by_projection(family).items():
        hook = lambda _, args, site=site: site(args[0])  # noqa: E731
        handles.append(block.get_submodule(name).register_forward_pre_hook(hook))
    set_attention(attention, transforms.attention)
    try:
        yield
    finally:
        set_attention(attention, None)
        for handle in handles:
            handle.remove()


def _wide(part: Tensor, integers: Tensor) -> Tensor:
    """Scale or zero point (r, groups) of every weight, (r, c)."""
    return part.repeat_interleave(integers.shape[-1] // part.shape[-1], -1)


def _batches(sequences: int, size: int) -> Iterator[Tensor]:
    """Indices of `size` sequences at a time, without end, each once in every shuffled round."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from torch.randperm(sequences, generator=generator).split(size)
