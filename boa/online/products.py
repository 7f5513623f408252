"""Products of attention that SDPA has not: logits with a soft cap, and heads with a sink."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_CHANNELS = 8  # more, for a sink: kernels of GPUs take multiples of 8


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float | None, softcap: float
) -> Tensor:
    """Attention whose logits s are `softcap * tanh(s / softcap)` (Gemma 2), which SDPA has not.

    Args:
        query, key, value: as in `attention_forward`.
        mask: (batch or 1, 1 or heads, length, key length), true or 0 where a key is seen; None is causal, the last
            query at the last key.

    Returns:
        (batch, length, heads, head_dim). One sequence at a time: the logits of a batch would not fit.
    """
    heads, length, size = query.shape[1:]
    groups, seen = key.shape[1:3]
    if mask is None:
        mask = torch.ones(1, 1, length, seen, dtype=torch.bool, device=query.device).tril_(seen - length)
    output = torch.empty_like(query).transpose(1, 2)
    for i in range(len(query)):
        logits = query[i].reshape(groups, -1, size) @ key[i].transpose(1, 2)
        logits = logits.mul_(scaling if scaling is not None else size**-0.5).div_(softcap).tanh_().mul(softcap)
        logits, own = logits.view(heads, length, seen), mask[min(i, len(mask) - 1), ..., :seen]
        logits = logits.masked_fill_(~own, float("-inf")) if own.dtype == torch.bool else logits + own
        part = logits.softmax(-1).view(groups, -1, seen) @ value[i]
        output[i] = part.view(heads, length, -1).transpose(0, 1)
    return output.contiguous()


def with_sink(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same attention where every query sees one key more, behind the others, whose value is 0.

    Its product with a query of head h is `sinks[h]`, exactly: queries and keys get some channels more, of which one
    holds that of queries and a 1 of this key. So every head has the same mask, and any kernel computes it.

    Args:
        query, key, value, mask: as in `attention_forward`.
        sinks: (heads,), logits before they are scaled.
    """
    wide = query.new_zeros(*query.shape[:-1], _CHANNELS)
    wide[..., 0] = sinks.to(query)[:, None]
    last = key.new_zeros(*key.shape[:2], 1, key.shape[3] + _CHANNELS)
    last[..., key.shape[3]] = 1
    length, seen = query.shape[2], key.shape[2]
    if mask is None and length > 1:
        mask = torch.ones(1, 1, length, seen, dtype=torch.bool, device=query.device).tril_()
    if mask is not None:
        mask = mask[..., :seen]
        mask = torch.cat([mask, mask.new_full((*mask.shape[:-1], 1), mask.dtype == torch.bool)], -1)
    key = torch.cat([nn.functional.pad(key, (0, _CHANNELS)), last], 2)
    return torch.cat([query, wide], -1), key, nn.functional.pad(value, (0, 0, 0, 1)), mask
