"""One decoder block, true-sequential: queries and keys; values; the output projection; gate and up; down.

Two streams of hidden states run through it. The full-precision one says what each layer should have computed, the
quantized one, with activation and cache quantizers on, what it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..objective.objective import is_finite
from ..precision import quick_products
from ..solver.rounding import Quantized
from ..stopwatch import stage
from .block_output import BlockOutput, Rounded, learn_block
from .experts_half import ExpertsHalf
from .fold_half import ChannelFold


class BlockQuantizer(ChannelFold, ExpertsHalf):
    """Quantizes the projections of one block.

    Args:
        decoder: makes and runs blocks.
        block: the block, its norms folded and rotated as the recipe asks.
        settings: of the rounding.
        transforms: online rotations and quantizers.
        batch: sequences computed at a time.
        report: called with each projection's name and its loss relative to that of a zero weight.
        done: results of an earlier run by projection; these are used as they are.
        empty: makes the tensors that hold a layer's input for all tokens, by their size and `dtype`.
        release: called after each batch, so that what lies in files need not stay in memory.
        references: also measure RTN and plain GPTQ on each projection's objective.
        ranks: the processes that quantize the block together, each with some of the sequences.

    After `run`: `results` holds each projection's integers (r, c), scale and zero (r, groups), `losses` the relative
    loss of each, `objectives` what `relative_losses` finds of each where `references` are asked for, `damping` that of
    the projections whose Hessian needed more than the settings say, `quantized` the block with dequantized weights,
    `fallbacks` the projections of experts that saw too few tokens, with their number, `channel_scales` what Z-Fold
    found by site, and `folded` the norms and biases that it changed, `centers` that of the keys, by its name inside the
    block; where the method is brecq, `losses` and `objectives` are those of the solution that it starts from, and
    `output_error` holds the error of the block's output there and at the end.
    """

    output_error: tuple[float, float] | None = None

    @torch.no_grad()
    @stage("forward")
    def run(self, full: Tensor, quantized: Tensor) -> None:
        """Quantize, and move both streams (sequences, length, hidden) through the block, in place.

        Of several ranks each gives the streams of its own sequences, and all get the same results.

        Raises:
            ValueError: a weight, an objective or a stream is not finite, or an objective stays indefinite; the message
                names the projections, or the half of the block that the stream has just left.
        """
        self._share(len(full))
        with quick_products(self.decoder.device):
            self._through(full, quantized)

    def _through(self, full: Tensor, quantized: Tensor) -> None:
        for name in self.family.projections:
            if not torch.stack(self._weight(name).aminmax()).isfinite().all():
                raise ValueError(f"{name}: its weight holds NaN or Inf")
        self._check("", full, quantized)
        self._fold(full)
        learns = self.settings.method == "brecq" and self.previous is None
        streams = (full, quantized)
        before = [self.empty(*part.shape, dtype=part.dtype).copy_(part) for part in streams if learns]
        self._halves(full, quantized)
        if learns:
            self._learn(before[1], full)
            # Moved again with what is learned, as a run that goes on from its results moves them.
            for stream, given in zip(streams, before, strict=True):
                stream.copy_(given)
            self._halves(full, quantized)

    @stage("refinement")
    def _learn(self, given: Tensor, wanted: Tensor) -> None:
        """All projections on the output of the block; `done` are the results then."""
        output = BlockOutput(self.decoder, self.quantized, self.transforms, given, wanted)
        start = {name: Rounded(part.integers, part.scale, part.zero) for name, part in self.results.items()}
        found, *errors = learn_block(output, start, self.settings.bits, self.settings.learning, self.batch)
        self.output_error = (errors[0], errors[1])
        self.results = {name: Quantized(found[name], part.scale, part.zero) for name, part in start.items()}
        self.previous = self.results

    def _halves(self, full: Tensor, quantized: Tensor) -> None:
        self._attention_half(full, quantized)
        self._check(self.family.output, full, quantized)
        (self._experts_half if self.family.experts else self._mlp_half)(full, quantized)
        self._check(self.family.mlp if self.family.experts else self.family.down, full, quantized)

    def _check(self, layer: str, full: Tensor, quantized: Tensor) -> None:
        """Find NaN and Inf in the streams after the layer that has just written to them."""
        for name, stream in (("full-precision", full), ("quantized", quantized)):
            if not all(is_finite(part) for part in stream.split(self.batch)):
                where = f"{layer}: the {name} stream after it" if layer else f"the {name} stream that comes in"
                raise ValueError(f"{where} holds NaN or Inf")
