"""A scale per input channel, taken out of some projections and put into the layer before them, exactly.

With D = diag(zeta) > 0, `W x = (W D^-1) (D x)`: what reads becomes W D^-1, what makes x takes D (Z-Fold, Jeon et al.,
EMNLP 2023). As integers I with a scale s per row, the readers then mean s (I - z) D: a second scale, free at run time.

| site | readers | takes D |
|---|---|---|
| qkv | q, k, v | the attention norm: its weight, and the bias of a LayerNorm |
| output | O | rows of V and its bias; a value channel has one zeta for the query heads of its group |
| gate_up | gate and up | the MLP's norm, where it is not attention's |
| down | down | rows of up and its bias: act(gate) * up is linear in up, and a ReLU alone is so for zeta > 0 |

Keys and queries meet in a product: a channel of the keys times zeta against the same channel of the queries over zeta.
RoPE turns channels in pairs, which share one (`key_ties`). `keys` and `queries` take their scales into the norm of each
head where there is one, which all heads then share, else into rows of K and Q and their biases. What norms store of
their scales is rounded (`absorbable`): the two are then inverse, and those of a pair alike, to 2^-6 at worst.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.families import Family
from ..models.shape import Shape

HEADS = ("keys", "queries")


def obstacle(family: Family, config: Any, site: str, *, online_r1: bool, heads: bool, r4: bool) -> str:
    """Why no layer can take the scales of `site` under these rotations, as a clause; empty where one can."""
    if site in ("qkv", "gate_up") and not family.pre_norms:
        return f"no norm stands before {_short(family, site)}"
    if site in ("qkv", "gate_up") and online_r1:
        return f"R1 runs online between the norm and {_short(family, site)}"
    if site == "gate_up" and family.shared_norm:
        return f"{_short(family, site)} read the norm of attention, which takes the scales of site qkv for them too"
    if family.hybrid or family.compressions or not family.has_values:
        return f"attention has a gate or latents, or something else in its place, in '{family.model_type}' models"
    if site == "output" and heads:
        return f"a rotation over all heads runs online between {family.value} and {family.output}"
    if site in ("gate_up", "down") and family.experts:
        return f"experts, which share a norm with their router, are not scaled ({_short(family, site)})"
    if site == "down" and r4:
        return f"R4 runs online between {family.up} and {family.down}"
    function = activation_of(config)
    if site == "down" and not family.gate and function != "relu":
        return f"{function} stands between {family.up} and {family.down}, and relu alone lets a scale through"
    return ""


def activation_of(config: Any) -> str:
    """The name of the MLP's activation."""
    fields = ("activation_function", "hidden_activation", "hidden_act", "activation")
    names = (getattr(config, field, None) for field in fields)
    return str(next((name for name in names if name is not None), "the activation"))


def _short(family: Family, site: str) -> str:
    names = {"qkv": (family.query, family.key, family.value), "gate_up": (family.gate, family.up)}
    return ", ".join(name for name in names.get(site, (family.down,)) if name)


def readers(family: Family, site: str) -> tuple[str, ...]:
    """The layers whose input channels `site` scales; of a mixture's norm what decides is among them, at the end.

    Where attention and MLP share a norm, what reads it in the MLP is a reader of `qkv`.

    A `site` may be the name of one expert's down projection, which alone reads what that expert makes.
    """
    if site in family.downs:
        return (site,)
    return {
        "qkv": family.norm_readers[family.attention_norm],
        "output": (family.output,),
        "gate_up": () if family.shared_norm else (*family.mlp_inputs, *family.weighing),
        "down": family.downs,
        "keys": (),
        "queries": (),
    }[site]


def _before(family: Family, site: str) -> str:
    """The norm or the projection that takes the scales of `site`."""
    if family.experts and site in family.downs:
        return family.expert(family.downs.index(site))[1]
    return {
        "qkv": family.attention_norm,
        "output": family.value,
        "gate_up": family.mlp_norm,
        "down": family.up,
        "keys": family.key_norm or family.key,
        "queries": family.query_norm or family.query,
    }[site]


def ties(shape: Shape, site: str) -> Tensor | None:
    """Which scale each input channel of `site` takes, (c,) indices; None: each its own.

    A value channel is read by every query head of its group.
    """
    if site != "output":
        return None
    channels = torch.arange(shape.key_width).view(shape.key_heads, 1, shape.head_dim)
    return channels.expand(-1, shape.query_heads // shape.key_heads, -1).flatten()


def key_ties(head_dim: int, rotary: int, *, neighbours: bool = False) -> Tensor:
    """Which scale each channel of a key takes, (head_dim,) indices: RoPE turns the first `rotary`, j with j + half, or
    2 j with 2 j + 1.
    """
    channels = torch.arange(head_dim)
    if neighbours:
        channels[1:rotary:2] = channels[0:rotary:2]
    else:
        channels[rotary // 2 : rotary] = channels[: rotary // 2]
    return channels


def _scaled_norm(family: Family, site: str) -> str | None:
    """The norm that takes the scales of `site`; None where a projection does."""
    return {
        "qkv": family.attention_norm,
        "gate_up": family.mlp_norm,
        "keys": family.key_norm,
        "queries": family.query_norm,
    }.get(site)


def absorbable(tensors: Mapping[str, Tensor], family: Family, site: str, zeta: Tensor) -> Tensor:
    """The nearest scales to `zeta` with which what takes them is stored without an error, of the same shape.

    A norm's weight is stored in the checkpoint's dtype: it is made one that bfloat16 holds, and so float16 and float32.
    A channel that the norm multiplies by 0 has no scale.
    """
    norm = _scaled_norm(family, site)
    if norm is None:
        return zeta
    stored = tensors[f"{norm}.weight"]
    weight = stored + family.norm_offset
    scaled = _bfloat16(weight * zeta.to(weight) - family.norm_offset) + family.norm_offset
    return torch.where((weight != 0) & (scaled * weight > 0), scaled / weight, torch.ones_like(weight))


def scale_channels(
    tensors: Mapping[str, Tensor], family: Family, shape: Shape, site: str, zeta: Tensor
) -> dict[str, Tensor]:
    """The tensors of a block that change when `site` takes the scales `zeta`, new ones in their own dtype.

    Args:
        tensors: of the block, by their names inside it; not changed.
        zeta: positive, one an input channel of the site; for `output` one a value channel, (key heads * head_dim,); for
            `keys` and `queries` one a channel of all heads, or of one where a norm takes it.
    """
    tie = ties(shape, site)
    columns = zeta if tie is None else zeta[tie.to(zeta.device)]
    changed = {}
    for name in readers(family, site):
        weight = tensors[f"{name}.weight"]
        changed[f"{name}.weight"] = weight / columns.to(weight)
    name = _before(family, site)
    weight = tensors[f"{name}.weight"]
    if _scaled_norm(family, site) is not None:
        changed[f"{name}.weight"] = (weight + family.norm_offset) * zeta.to(weight) - family.norm_offset
    else:
        changed[f"{name}.weight"] = weight * zeta.to(weight)[:, None]
    if (bias := tensors.get(f"{name}.bias")) is not None:
        changed[f"{name}.bias"] = bias * zeta.to(bias)
    return changed


def _bfloat16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)
