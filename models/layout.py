"""Blocks with one linear layer a projection, where transformers keeps several in one tensor, and norms without bias.

The classes here take the place of modules inside the real block; what calls them stays transformers' own.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .experts.expert_layers import Expert, MergedExpert, split_experts
from .experts.fused_experts import split_fused
from .families import Family, Merged
from .inner_attention import InnerAttention
from .shape import Shape


class Stacked(nn.Module):
    """Linear layers that read the same input, their outputs laid end to end: the merged layer, in parts.

    With `groups` outputs come in so many equal groups, each with its piece of every layer.
    """

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., sum of outs)."""
        parts = [part(x).unflatten(-1, (self.groups, -1)) for part in self.children()]
        return torch.cat(parts, dim=-1).flatten(-2)


def split_modules(block: nn.Module, family: Family, shape: Shape, attention: str = "sdpa") -> nn.Module:
    """Replace merged layers and fused experts of a block by layers of their own, in place; weights are not copied.

    `family` and `shape` are those of the block. `attention` is the name of the function that an attention of ours
    calls, where the class has it inside itself.
    """
    if not family.pre_norms:
        block.add_module(family.attention_norm, nn.Identity())
        block.add_module(family.mlp_norm, nn.Identity())
    for merged in family.merged:
        linear = block.get_submodule(merged.name)
        assert isinstance(linear, nn.Linear)
        stacked = Stacked(_groups(merged, shape))
        for part, size in merged.parts.items():
            stacked.add_module(part, _linear(linear, _rows(merged, part, size, family, shape)))
        block.set_submodule(merged.name, stacked)
    if family.own_attention:
        inner = block.get_submodule(family.attention)
        block.set_submodule(family.attention, InnerAttention(inner, family, shape, attention))
    if family.experts:
        fused = block.get_submodule(family.experts)
        options = {"bias": family.expert_bias, "scored": family.scores_inputs}
        block.set_submodule(family.experts, split_experts(fused, shape.hidden, shape.ffn, **options))
    if family.shared:
        block.set_submodule(family.shared, _shared(block.get_submodule(family.shared), shape))
    if family.layer_norm:
        for norm, readers in family.norm_readers.items():
            give_norm_bias(block, norm)
            for linear in (block.get_submodule(name) for name in readers):
                assert isinstance(linear, nn.Linear)
                if linear.bias is None:
                    linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)
    return block


def _shared(alone: Any, shape: Shape) -> Expert | MergedExpert:
    """The expert that takes the place of a module that all tokens go to."""
    if hasattr(alone, "input_linear"):  # in parts already
        return MergedExpert(alone.input_linear, alone.output_linear, alone.activation)
    up, function = alone.up_proj, getattr(alone, "act_fn", None) or alone.activation_fn
    return Expert(shape.hidden, shape.shared_ffn, function, up.weight, bias=up.bias is not None)


def _groups(merged: Merged, shape: Shape) -> int:
    return int(getattr(shape, merged.groups)) if merged.groups else 1


def _rows(merged: Merged, part: str, size: str, family: Family, shape: Shape) -> int:
    """Of a part of a merged layer."""
    return int(getattr(shape, size)) if size else (family.sizes or {})[f"{merged.name}.{part}"][0]


def _linear(like: nn.Linear, outputs: int) -> nn.Linear:
    weight = like.weight
    return nn.Linear(like.in_features, outputs, like.bias is not None, device=weight.device, dtype=weight.dtype)


def split_tensors(tensors: Mapping[str, Tensor], family: Family, shape: Shape) -> dict[str, Tensor]:
    """The same for the tensors of a block, by their names inside it."""
    result = dict(tensors)
    for merged in family.merged:
        for kind in ("weight", "bias"):
            if (tensor := result.pop(f"{merged.name}.{kind}", None)) is not None:
                groups = _groups(merged, shape)
                sizes = [_rows(merged, *part, family, shape) // groups for part in merged.parts.items()]
                pieces = tensor.unflatten(0, (groups, -1)).split(sizes, 1)
                names = (f"{merged.name}.{part}.{kind}" for part in merged.parts)
                result.update(zip(names, (piece.flatten(0, 1) for piece in pieces), strict=True))
    if family.experts and family.fused:
        result = split_fused(result, family, shape)
    return result | {
        f"{n}.bias": result[f"{n}.weight"].new_zeros(size) for n, size in given_biases(result, family, shape).items()
    }


def given_biases(names: Container[str], family: Family, shape: Shape) -> dict[str, int]:
    """How many zeros are the biases of norms, and of what reads them, that a block with these tensors has not.

    Args:
        names: of tensors inside the block, each projection by itself.
        family: of the block; where its norms are no LayerNorm there are none.
        shape: of the block.
    """
    if not family.layer_norm:
        return {}
    rows = {family.query: shape.query_width, family.key: shape.key_width, family.value: shape.key_width}
    rows |= dict.fromkeys(family.mlp_inputs, shape.ffn) | dict.fromkeys(family.norm_readers, shape.hidden)
    return {name: size for name, size in rows.items() if f"{name}.bias" not in names}


def expected_shapes(shapes: Mapping[str, torch.Size], family: Family, shape: Shape) -> dict[str, torch.Size]:
    """The tensors of a checkpoint, of those that the model has, every expert by itself; see `fused_experts.on_disk`."""
    result = {}
    for name, size in shapes.items():
        if family.experts and f"{family.experts}." in name:
            continue
        result[name] = size
    wide, tall = (shape.ffn, shape.hidden), (shape.hidden, shape.ffn)
    for block in (index for index in range(shape.blocks) if family.at(index).experts):
        for i in range(family.expert_count):
            for projection, (rows, columns) in zip(family.expert(i), (wide, wide, tall), strict=True):
                name = f"{family.layers}.{block}.{projection}"
                result[f"{name}.weight"] = torch.Size((rows, columns))
                if family.expert_bias:
                    result[f"{name}.bias"] = torch.Size((rows,))
    return result


def give_norm_bias(module: nn.Module, name: str) -> None:
    """Put a LayerNorm with a bias in the place of the norm `name`, where that has none."""
    norm = module.get_submodule(name)
    if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
        return
    like = norm.get_parameter("weight")
    eps: Any = getattr(norm, "variance_epsilon", None) or norm.eps
    module.set_submodule(name, nn.LayerNorm(like.shape, eps=eps, device=like.device, dtype=like.dtype))


def drop_norm_bias(module: nn.Module, name: str) -> None:
    """Put an RMSNorm in the place of the LayerNorm `name`: the same function of inputs of mean zero, but for the bias.

    LayerNorm divides by the deviation and RMSNorm by the root mean square, with the same epsilon below the root.
    """
    give_norm_bias(module, name)  # it is then torch's
    norm = module.get_submodule(name)
    assert isinstance(norm, nn.LayerNorm)
    like = norm.weight
    module.set_submodule(name, nn.RMSNorm(norm.normalized_shape, eps=norm.eps, device=like.device, dtype=like.dtype))


def fold_layer_norms(model: nn.Module, family: Family) -> None:
    """Give a whole model the modules that it has once LayerNorms are folded: no bias in norms, one in the head."""
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    for block in layers:
        for norm in family.norm_readers:
            drop_norm_bias(block, norm)
    drop_norm_bias(model, family.final_norm)
    if not hasattr(model, family.head):
        return  # a decoder alone, or with another head
    head = model.get_submodule(family.head)
    assert isinstance(head, nn.Linear)
    head.bias = nn.Parameter(head.weight.new_zeros(head.out_features), requires_grad=False)
