"""A diagonal that balances a site before it is rotated: inputs and weights then lose least to rounding together.

With T = R diag(t) at a site (x -> T x, W -> W T^-1), R a Hadamard rotation, rounding the inputs by token makes a noise
of about |W T^-1|_F^2 E|T x|^2 in the output, and rounding the weights by row one bounded by the same product. R changes
neither factor and spreads the channels; over t the product is least where

    t_j = (|W_j|^2 / E x_j^2)^(1/4),

W_j the columns of all layers that read the site together (Cauchy-Schwarz on the two sums over j). SmoothQuant (arXiv
2211.10438) has maxima in the place of root mean squares, and alpha 1/2. t goes into what makes the site's input, at no
cost as the model runs: see `channels`.

Keys that are rounded for the cache are balanced likewise against the queries that meet them. The noise of q . k is
|q / t|^2 E|t k|^2, so E q_j^2 stands where |W_j|^2 does. Both are of pairs of channels, whose sums of squares RoPE does
not change. Of keys that are rounded without their center, it is what is left of k that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.decoder import Decoder
from ..models.families import Family
from ..models.shape import Shape
from .channels import HEADS, absorbable, activation_of, key_ties, readers, ties

BOUND = 64.0
"""How far a scale may be from the geometric mean of its site: what lies beyond is dead, or close to it."""
STORED = 2.0**-7
"""How far a stored scale of keys or queries may be from the wanted one, relative to it: twice bfloat16's own error."""


def balanced_sites(family: Family, config: Any, *, folded: bool, keys: bool = False) -> tuple[str, ...]:
    """The sites of a block whose input can take a scale a channel before it is rotated.

    `qkv`, `output`, `gate_up` and `down`; with experts the name of every down projection in place of `down`. Where the
    norms are `folded` into their readers for R1, the inputs of these are rotated without them, and have nothing to take
    a scale; the input of down has where it is linear in up. `keys` and `queries` where keys are rounded, unless they
    have one norm together, which cannot take what is the other's inverse.
    """
    through = family.linear_up if family.gate else activation_of(config) == "relu"
    downs = (family.downs if family.experts else ("down",)) if through else ()
    before = () if folded or not family.pre_norms else ("qkv",) if family.shared_norm else ("qkv", "gate_up")
    if family.mixed:
        return (*before, *downs)
    sites = (*before[:1], "output", *before[1:], *downs)
    one = family.key_norm is not None and family.key_norm == family.query_norm
    return (*sites, *HEADS) if keys and not family.compressions and not one else sites


Record = Callable[[nn.Module, None, Callable[[Any], None] | None], None]
"""`boa.attention.set_attention`: lets a function see the `query` and `key` that attention computes with, after RoPE."""


class Moments:
    """Collects E x_j^2 of the sites of one block while it runs, a token's x relative to its root mean square.

    Rounding is relative to the size of a token, and so is what the next norm leaves of its error. Counted alike, the
    massive activations of a first token would decide alone. Of `gate_up` with experts, a token counts once for every
    expert that it goes to. Queries, which are not rounded, count as they are: `keys`
    and `queries` are E k_j^2 and E q_j^2 after RoPE, (heads, head_dim), a token's key relative to itself; where heads
    share a norm, the mean over them, (1, head_dim). `centered` keys are k_j - E k_j of each head.

    Args:
        record: for `keys` and `queries`.
    """

    def __init__(
        self,
        family: Family,
        block: nn.Module,
        names: tuple[str, ...],
        record: Record,
        *,
        centered: bool,
    ) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count: dict[str, int] = {}
        self._shared, self._centered = family.key_norm is not None and not family.head_norms_whole, centered
        self._handles = [
            block.get_submodule(layer).register_forward_pre_hook(self._look(name))
            for name in names
            if name not in HEADS
            for layer in _seeing(family, name)
        ]
        self._stop: Callable[[], None] = lambda: None
        if "keys" in names:
            attention = block.get_submodule(family.attention)
            record(attention, None, self._attention_inputs)
            self._stop = partial(record, attention, None, None)

    def _look(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._add(name, _relative(args[0].flatten(0, -2).float().square()))

        return hook

    def _attention_inputs(self, seen: Any) -> None:
        query, key = (part.transpose(1, 2).flatten(0, 1).float() for part in (seen.query, seen.key))
        weight = _per_square(key.square())
        for name, part in (
            ("queries", query.square()),
            ("keys", weight * key.square()),
            ("means", weight * key),
            ("weights", weight),
        ):
            self._add(name, part)

    def _add(self, name: str, part: Tensor) -> None:
        total = part.sum(0).double()
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._count[name] = self._count.get(name, 0) + len(part)

    def value(self) -> dict[str, Tensor]:
        """(c,) in float64 by site; an expert that no token went to is not there. Looks no further."""
        for handle in self._handles:
            handle.remove()
        self._stop()
        found = {name: total.cpu() / self._count[name] for name, total in self._sums.items()}
        if "keys" in found:
            means, weights = found.pop("means"), found.pop("weights")
            if self._centered:
                found["keys"] = (found["keys"] - means.square() / weights).clamp_min(0)
            if self._shared:
                found |= {name: found[name].mean(0, keepdim=True) for name in HEADS}
        return found


@torch.no_grad()
def moments(
    decoder: Decoder,
    block: nn.Module,
    hidden: Tensor,
    names: tuple[str, ...],
    batch: int,
    record: Record,
    *,
    centered: bool,
) -> dict[str, Tensor]:
    """`Moments` of one plain run of a block over the stream (sequences, length, hidden) at its start; not changed."""
    seen = Moments(decoder.family_of(block), block, names, record, centered=centered)
    for part in hidden.split(batch):
        decoder.run(block, part.to(decoder.device, decoder.dtype))
    return seen.value()


def scales(
    tensors: Mapping[str, Tensor], family: Family, shape: Shape, found: Mapping[str, Tensor], rotary: int
) -> dict[str, Tensor]:
    """The scales t of a block's sites, positive, in float64; those of `output` are one a value channel.

    Args:
        tensors: of the block, as in the checkpoint; `family` and `shape` are its own too.
        found: E x_j^2 by site, from `moments`.
        rotary: channels of a head that RoPE turns.
    """
    chosen = {}
    norms = {name: tensor.double().cpu() for name, tensor in tensors.items() if name in _norms(family)}
    for site, moment in found.items():
        if site in HEADS:
            continue
        weights = [tensors[f"{name}.weight"].double() for name in readers(family, site) if name not in family.deciders]
        energy = torch.stack([weight.square().sum(0) for weight in weights]).sum(0).cpu()
        tie = ties(shape, site)
        if tie is not None:
            energy, moment = (torch.zeros(int(tie.max()) + 1).double().index_add_(0, tie, x) for x in (energy, moment))
        chosen[site] = absorbable(norms, family, site, balance(energy, moment))
    if "keys" in found:
        keys, queries = found["keys"], found["queries"]
        tie = key_ties(shape.head_dim, rotary, neighbours=family.rope_neighbours)
        both = (queries.unflatten(0, (len(keys), -1)).sum(1), keys)
        energy, moment = (torch.zeros_like(x).index_add_(1, tie, x)[:, tie] for x in both)
        t, groups = (
            torch.stack([balance(*head) for head in zip(energy, moment, strict=True)]),
            len(queries) // len(keys),
        )
        t = _held(norms, family, t, tie, groups)
        chosen["keys"] = absorbable(norms, family, "keys", t.flatten())
        met = chosen["keys"].view_as(t).repeat_interleave(groups, 0)
        chosen["queries"] = absorbable(norms, family, "queries", 1 / met.flatten())
    return chosen


def _held(norms: Mapping[str, Tensor], family: Family, t: Tensor, tie: Tensor, groups: int) -> Tensor:
    """Scales of keys (heads, head_dim) where the norms of keys and queries can store them; else their pair has 1.

    A norm that multiplies by 1 + w stores a small multiplier coarsely: the nearest may be several times another.
    """
    off = torch.zeros_like(t)
    for site, wanted in (("keys", t), ("queries", (1 / t).repeat_interleave(groups, 0))):
        lost = (absorbable(norms, family, site, wanted.flatten()).view_as(wanted) / wanted - 1).abs() > STORED
        off += lost.unflatten(0, (len(t), -1)).sum(1)
    return torch.where(torch.zeros_like(t).index_add_(1, tie, off)[:, tie] > 0, 1.0, t)


def balance(energy: Tensor, moment: Tensor) -> Tensor:
    """t = (energy / moment)^(1/4), both (c,), with a geometric mean of 1 and within `BOUND` of it.

    A channel that is dead in the inputs, or that no weight reads, has 1.
    """
    alive = (energy > 0) & (moment > 0)
    if not alive.any():
        return torch.ones_like(energy)
    t = torch.where(alive, energy / torch.where(alive, moment, 1.0), 1.0).pow(0.25)
    t = (t / t[alive].log().mean().exp()).clamp(1 / BOUND, BOUND)
    return torch.where(alive, t, 1.0)


def _seeing(family: Family, site: str) -> tuple[str, ...]:
    """Layers that together see all inputs of a site, each once: one of them, or one an expert."""
    if site == "gate_up" and family.experts:
        return tuple(family.expert(i)[0] for i in family.all_experts)
    return readers(family, site)[:1]


def _norms(family: Family) -> set[str]:
    names = (family.attention_norm, family.mlp_norm, family.key_norm, family.query_norm)
    return {f"{name}.weight" for name in names if name is not None}


def _relative(square: Tensor) -> Tensor:
    """Squares (..., n) over their mean."""
    return square * _per_square(square)


def _per_square(square: Tensor) -> Tensor:
    """One over the mean of squares (..., n), (..., 1)."""
    return square.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
