"""What R1 costs where it is merged: how much louder rounding's noise is than behind the norms.

Merged, a norm's weight g is folded into its readers W, and what is rounded is x^ Q, the normed stream before g. Noise
of the size of x^ in every channel then meets W diag(g). Behind the norm it is of the size of g x^, and meets W. As
powers,

    figure = (sum_j |W_j|^2 g_j^2) (sum_j E x^_j^2) / ((sum_j |W_j|^2) (sum_j g_j^2 E x^_j^2)),

which is 1 where g is constant. It is large where massive channels are silenced by the norm: they set the scale of what
is rounded, and the channels that g amplifies drown. The same holds for the weights' rows, whose errors meet x^.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..models.decoder import Decoder

HARMFUL = 8.0
"""A figure above which merged R1 does more harm than its spreading does good: noise of one and a half bits.

Seen (geometric means): 1.6 on SmolLM2-135M, where it helps weights of 2 bits; 160 on Gemma 3 270M, where it ruins all.
"""


def noise_figure(weight: Tensor, energy: Tensor, stream: Tensor) -> float:
    """The figure of one norm, in float64.

    Args:
        weight: g, (hidden,), with what the family adds to it.
        energy: |W_j|^2 of all layers that read the norm, (hidden,).
        stream: E x^_j^2 of the normed stream before g, (hidden,).
    """
    weight, energy, stream = weight.double().square(), energy.double(), stream.double()
    behind = energy.sum() * (weight * stream).sum()
    return float((energy * weight).sum() * stream.sum() / behind.clamp_min(torch.finfo(torch.float64).tiny))


@torch.no_grad()
def noise_figures(decoder: Decoder, tensors: Mapping[str, Tensor], block: nn.Module, hidden: Tensor) -> list[float]:
    """Those of both norms of a block with the checkpoint's `tensors`.

    They are averages over one run of it on the stream (sequences, length, hidden), which is not changed.
    """
    family, streams = decoder.family_of(block), dict[str, Tensor]()

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            square = (x - x.mean(-1, keepdim=True) if family.layer_norm else x).square()
            size = square.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            streams[name] = (square / size).mean(0)

        return hook

    norms = family.norm_readers
    handles = [block.get_submodule(norm).register_forward_pre_hook(look(norm)) for norm in norms]
    try:
        decoder.run(block, hidden.to(decoder.device, decoder.dtype))
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for norm, names in norms.items():
        weights = [tensors[f"{name}.weight"].to(decoder.device) for name in names if name not in family.deciders]
        energy = torch.stack([weight.double().square().sum(0) for weight in weights]).sum(0)
        scale = tensors[f"{norm}.weight"].to(decoder.device).double() + family.norm_offset
        found.append(noise_figure(scale, energy, streams[norm]))
    return found
