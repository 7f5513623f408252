"""Projections that write to the residual stream: both streams move through them, and what they lack is collected."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..objective.statistics import InputStatistics
from ..objective.totals import Total
from .context import Batch, BlockContext, Streams
from .forward_parts import branch_output


class Writer(NamedTuple):
    """A projection that writes to the stream, and the norm in between where there is one."""

    name: str
    post_norm: str | None = None


def write_full(
    context: BlockContext,
    writer: Writer,
    statistics: Total[InputStatistics],
    streams: Streams,
    batch: Batch,
    exact: Tensor,
    given: Tensor,
) -> None:
    """Move a batch of the full stream through a projection that writes to it, and collect the other's statistics.

    Where there is a norm between the projection's output y and the stream, an error of y counts by one over rms(y);
    the norm's weight multiplies rows, which are rounded each for itself, and changes nothing. What the stream has lost
    is not made up for then: it could only be by an output that the norm divides again.

    Args:
        context: of the block.
        writer: the projection.
        statistics: where they go, unless there are results of an earlier run.
        streams: the full one is changed in place.
        batch: both streams before the projection.
        exact, given: the projection's input in both, (batch, length, c).
    """
    projection = context.full.get_submodule(writer.name)
    written = projection(exact)
    if context.previous is None:
        wanted = written if projection.bias is None else written - projection.bias
        if writer.post_norm is not None:
            weight = over_norm(written)
            wanted, given = wanted * weight, given * weight
        elif context.settings.drift:
            wanted = wanted + (batch.full - batch.quantized) / context.decoder.branch_factor
        statistics.at(batch.number).add(None, given, wanted)
    stream = streams.full[batch.span]
    stream += branch_output(context.decoder, context.full, writer.post_norm, written).to(stream.device)


def add_given(context: BlockContext, statistics: Total[InputStatistics], batch: Batch, given: Tensor) -> None:
    """Collect the statistics of such a projection's input in the quantized stream alone, (batch, length, c)."""
    if context.previous is None:
        statistics.at(batch.number).add(None, given)


def write_quantized(context: BlockContext, writer: Writer, streams: Streams, inputs: Tensor) -> None:
    """Move the quantized stream through a projection that is quantized now; its `inputs` are (sequences, length, c)."""
    projection, size = context.quantized.get_submodule(writer.name), context.share.batch
    for part, x in zip(streams.quantized.split(size), inputs.split(size), strict=True):
        y = projection(x.to(context.decoder.device))
        part += branch_output(context.decoder, context.quantized, writer.post_norm, y).to(part.device)
        context.release()


def over_norm(written: Tensor) -> Tensor:
    """One over the root mean square of what is written of each token, (..., 1)."""
    return written.square().mean(-1, keepdim=True).clamp_min(torch.finfo(written.dtype).tiny).rsqrt()
