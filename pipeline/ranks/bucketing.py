"""Tensors put together for the wire: many small ones in one message, large ones in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BUCKET = 1 << 26  # bytes of tensors that are summed or sent together


def buckets(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Flat tensors, and what is to be put back from them; large contiguous tensors are their own, in parts."""
    waiting: list[Tensor] = []

    def packed() -> tuple[Tensor, list[Tensor]]:
        return torch.cat([part.reshape(-1) for part in waiting]), list(waiting)

    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if size >= BUCKET and tensor.is_contiguous():
            for part in tensor.view(-1).split(BUCKET // tensor.element_size()):
                yield part, []
            continue
        held = sum(part.numel() * part.element_size() for part in waiting)
        if waiting and (held + size > BUCKET or waiting[0].dtype != tensor.dtype or waiting[0].device != tensor.device):
            yield packed()
            waiting = []
        if size:
            waiting.append(tensor)
    if waiting:
        yield packed()


def unpack(flat: Tensor, parts: Sequence[Tensor]) -> None:
    """Put back what is in a flat tensor of `buckets`."""
    start = 0
    for part in parts:
        part.copy_(flat[start : start + part.numel()].view(part.shape))
        start += part.numel()
