"""A diagonal that balances a site before it is rotated: inputs and weights then lose least to rounding together.

With T = R diag(t) at a site (x -> T x, W -> W T^-1), R a Hadamard rotation, rounding the inputs by token makes a noise
of about |W T^-1|_F^2 E|T x|^2 in the output, and rounding the weights by row one bounded by the same product. R changes
neither factor and spreads the channels; over t the product is least where

    t_j = (|W_j|^2 / E x_j^2)^(1/4),

W_j the columns of all layers that read the site together: Cauchy-Schwarz on sum_j |W_j|^2 / t_j^2 * sum_j t_j^2 E x_j^2.
SmoothQuant (arXiv 2211.10438) has maxima in the place of root mean squares, and alpha 1/2. t goes into what makes the
site's input, at no cost as the model runs: see `channels`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..models.decoder import Decoder
from ..models.families import Family
from ..models.shape import Shape
from .channels import absorbable, readers, ties

BOUND = 64.0
"""How far a scale may be from the geometric mean of its site: what lies beyond is dead, or close to it."""


def balanced_sites(family: Family, config: Any, *, folded: bool) -> tuple[str, ...]:
    """The sites of a block whose input can take a scale a channel before it is rotated.

    `qkv`, `output`, `gate_up` and `down`; with experts the name of every down projection in place of `down`. Where the
    norms are `folded` into their readers for R1, the inputs of these are rotated without them, and have nothing to take
    a scale; the input of down has where it is linear in up.
    """
    through = family.gate or getattr(config, "activation_function", None) == "relu"
    downs = (family.downs if family.experts else ("down",)) if through else ()
    return ("output", *downs) if folded else ("qkv", "output", "gate_up", *downs)


class Moments:
    """Collects E x_j^2 of the sites of one block while it runs, a token's x relative to its root mean square.

    Rounding is relative to the size of a token, and so is what the next norm leaves of its error. Counted alike, the
    massive activations of a first token would decide alone.
    """

    def __init__(self, family: Family, block: nn.Module, names: tuple[str, ...]) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count: dict[str, int] = {}
        self._handles = [
            block.get_submodule(readers(family, name)[0]).register_forward_pre_hook(self._look(name)) for name in names
        ]

    def _look(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            square = args[0].flatten(0, -2).float().square()
            square /= square.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            total = square.sum(0).double()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._count[name] = self._count.get(name, 0) + len(square)

        return hook

    def value(self) -> dict[str, Tensor]:
        """(c,) in float64 by site; an expert that no token went to is not there. Looks no further."""
        for handle in self._handles:
            handle.remove()
        return {name: total.cpu() / self._count[name] for name, total in self._sums.items()}


@torch.no_grad()
def moments(
    decoder: Decoder, block: nn.Module, hidden: Tensor, names: tuple[str, ...], batch: int
) -> dict[str, Tensor]:
    """`Moments` of one plain run of a block over the stream (sequences, length, hidden) at its start; not changed."""
    seen = Moments(decoder.family, block, names)
    for part in hidden.split(batch):
        decoder.run(block, part.to(decoder.device, decoder.dtype))
    return seen.value()


def scales(
    tensors: Mapping[str, Tensor], family: Family, shape: Shape, found: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The scales t of a block's sites, positive, in float64; those of `output` are one a value channel.

    Args:
        tensors: of the block, as in the checkpoint.
        found: E x_j^2 by site, from `moments`.
    """
    chosen = {}
    for site, moment in found.items():
        weights = [tensors[f"{name}.weight"].double() for name in readers(family, site) if name != family.router]
        energy = torch.stack([weight.square().sum(0) for weight in weights]).sum(0).cpu()
        tie = ties(shape, site)
        if tie is not None:
            energy, moment = (torch.zeros(int(tie.max()) + 1).double().index_add_(0, tie, x) for x in (energy, moment))
        norms = {name: tensor.double().cpu() for name, tensor in tensors.items() if name in _norms(family)}
        chosen[site] = absorbable(norms, family, site, balance(energy, moment))
    return chosen


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


def _norms(family: Family) -> tuple[str, str]:
    return f"{family.attention_norm}.weight", f"{family.mlp_norm}.weight"
