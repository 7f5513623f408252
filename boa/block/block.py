"""One decoder block, true-sequential: queries and keys; values; the output projection; gate and up; down."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..objective.objective import is_finite
from ..precision import quick_products
from ..stopwatch import stage
from .attention_step import center_keys, quantize_attention
from .block_output import learn_output
from .context import BlockContext, BlockResult, Streams
from .directions_step import find_directions
from .experts_step import quantize_experts
from .fold_step import fold_channels
from .input_scales import find_scales
from .latent_step import quantize_latents
from .mixer_step import quantize_mixer
from .mlp_step import quantize_mlp
from .plain_step import quantize_plain


@torch.no_grad()
@stage("forward")
def quantize_block(context: BlockContext, streams: Streams) -> BlockResult:
    """Quantize the projections of a block, and move both streams through it, in place.

    Of several ranks each gives the streams of its own sequences, and all get the same results. Afterwards
    `context.quantized` has dequantized weights.

    Raises:
        ValueError: a weight, an objective or a stream is not finite, or an objective stays indefinite; the message
            names the projections, or the half of the block that the stream has just left.
    """
    with quick_products(context.decoder.device):
        _check_weights(context)
        _check_streams(context, streams, "")
        if context.family.generic:
            return _quantize_plain(context, streams)
        found = fold_channels(context, streams.full)
        context, directions = find_directions(context, streams)
        found |= directions
        context, centers = center_keys(context, streams)
        found |= centers
        context, scales = find_scales(context, streams)
        found |= scales
        if context.settings.method != "brecq" or context.previous is not None:
            return found | _quantize_layers(context, streams)
        before = streams.copy(context.empty)
        found |= _quantize_layers(context, streams)
        found |= learn_output(context, found.results, before.quantized, streams.full)
        # Moved again with what is learned, as a run that goes on from its results moves them.
        streams.restore(before)
        _quantize_layers(replace(context, previous=found.results), streams)
        return found


def _quantize_plain(context: BlockContext, streams: Streams) -> BlockResult:
    found = quantize_plain(context, streams)
    _check_streams(context, streams, context.family.projections[-1])
    return found


def _quantize_layers(context: BlockContext, streams: Streams) -> BlockResult:
    """Layer after layer, each given what those before it make of the quantized stream."""
    f = context.family
    before = streams.copy(context.empty) if f.parallel else None
    step = quantize_mixer if f.mixed else quantize_latents if f.compressions else quantize_attention
    found = step(context, streams)
    _check_streams(context, streams, f.output)
    found |= quantize_experts(context, streams) if f.experts else quantize_mlp(context, streams, before)
    _check_streams(context, streams, f.mlp if f.experts else f.down)
    return found


def _check_weights(context: BlockContext) -> None:
    for name in context.family.projections:
        if not torch.stack(context.weight(name).aminmax()).isfinite().all():
            raise ValueError(f"{name}: its weight holds NaN or Inf")


def _check_streams(context: BlockContext, streams: Streams, layer: str) -> None:
    """Find NaN and Inf in the streams after the layer that has just written to them."""
    for name, stream in (("full-precision", streams.full), ("quantized", streams.quantized)):
        if not all(is_finite(part) for part in stream.split(context.share.batch)):
            where = f"{layer}: the {name} stream after it" if layer else f"the {name} stream that comes in"
            raise ValueError(f"{where} holds NaN or Inf")
