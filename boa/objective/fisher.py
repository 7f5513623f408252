"""What attention makes of errors in queries and keys: the Fisher information of its probabilities.

With the probabilities a of one query l, an error dz of its logits costs the divergence dz^T (diag(a) - a a^T) dz / 2 to
second order. An error of the query moves all logits by K, so the head's H_out is

    sum over l of K^T (diag(a_l) - a_l a_l^T) K:  the keys' covariance as the query attends to them.

Errors of keys at several positions are taken as independent of each other, so that of key j costs a_lj (1 - a_lj) for
each query, and summed over j the key head's H_out is

    sum over l of (1 - |a_l|^2) q_l q_l^T.

BoA bounds the softmax's Jacobian by a constant instead, which leaves K^T K and Q^T Q (arXiv 2406.13474, eq. 12 and 13):
there a sink, which every query sees and no error moves, counts as much as it is large.

A logit of a head's own that is no key's (`AttentionInputs.sinks`) is a key of zeros here: no error moves it either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..online.attention import AttentionInputs, causal_probabilities

ROWS = 256  # queries for each channel of a head, which calibration text has more of than are needed
LEAST = 64  # queries of a chunk
ROUNDING = 8.0  # epsilons of the dtype, of what is subtracted, that the difference may be off by


def fisher_grams(seen: AttentionInputs, room: int, stride: int = 1, first: int = 0) -> tuple[Tensor, Tensor]:
    """H_out of query heads (heads, d, d) and of key heads (key heads, d, d), summed over a batch.

    Where logits are capped, errors count as if they were not.

    Args:
        seen: what attention computes with; queries and keys are after RoPE.
        room: probabilities held at a time.
        stride: only every so many queries count.
        first: the number of the batch's first sequence; sequence i starts with query i modulo `stride`.
    """
    (heads, length, size), groups = seen.query.shape[1:], seen.key.shape[1]
    per = heads // groups
    step = -(-max(LEAST, min(length, room // (heads * length))) // stride) * stride
    keys, queries = seen.key.new_zeros(groups, per, size, size), seen.key.new_zeros(groups, size, size)
    for i in range(len(seen.key)):
        for start in range((first + i) % stride, length, step):
            chunk = range(start, min(start + step, length), stride)
            stop = chunk[-1] + 1
            a = causal_probabilities(seen, i, start, stop, stride).unflatten(1, (per, -1))
            k, mass = seen.key[i, :, None, :stop], a.sum(2, keepdim=True)
            # Around their mean, so that a sink far from all other keys costs no digits.
            center = mass @ k / len(chunk)
            means, near = a @ k - center, k - center
            whole = torch.stack(
                [(near[:, h] * mass[:, h].transpose(1, 2)).transpose(1, 2) @ near[:, h] for h in range(per)], 1
            )
            total = a.sum(-1, keepdim=True) if seen.sinks is not None else a.new_ones(1, 1, 1, 1)
            if seen.sinks is not None:
                whole += (1 - total).sum(2, keepdim=True) * (center.transpose(-1, -2) @ center)
            keys += whole - means.transpose(-1, -2) @ means
            # Where each query sees one key the two are the same, and their last bits must not decide.
            floor = ROUNDING * torch.finfo(k.dtype).eps * whole.diagonal(dim1=-2, dim2=-1).mean(-1)
            keys.diagonal(dim1=-2, dim2=-1).add_(floor[..., None])
            q = seen.query[i, :, start:stop:stride].unflatten(0, (groups, per))
            spread = (total - a.square().sum(-1, keepdim=True)).clamp_min(0)
            queries += ((q * spread).flatten(1, 2)).transpose(1, 2) @ q.flatten(1, 2)
    return keys.flatten(0, 1), queries
