"""Blocks with one linear layer a projection, where transformers keeps several in one tensor, and norms without bias.

The classes here take the place of modules inside the real block; what calls them stays transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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


class Expert(nn.Module):
    """One expert: `down(act(gate(x)) * up(x))`; `bias`: each of the three has one."""

    def __init__(self, hidden: int, ffn: int, activation: nn.Module, like: Tensor, *, bias: bool = False) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": bias, "device": like.device, "dtype": like.dtype}
        self.gate_proj = nn.Linear(hidden, ffn, **options)
        self.up_proj = nn.Linear(hidden, ffn, **options)
        self.down_proj = nn.Linear(ffn, hidden, **options)
        self.act_fn = activation

    def inside(self, x: Tensor) -> Tensor:
        """The input of the down projection, (tokens, ffn)."""
        hidden: Tensor = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, hidden) -> the same."""
        output: Tensor = self.down_proj(self.inside(x))
        return output


class Experts(nn.ModuleList):
    """The experts of a block; transformers keeps all of them in two tensors of three dimensions."""

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Sum over a token's experts, each by its weight.

        Args:
            hidden: (tokens, hidden).
            index, weights: (tokens, experts per token), as the router gives them.
        """
        return sum_of_experts(len(self), lambda i, x: self[i](x), hidden, index, weights)


def sum_of_experts(
    count: int, run: Callable[[int, Tensor], Tensor], hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """As of `Experts`, of so many; `run` is what an expert computes of its tokens."""
    output = torch.zeros_like(hidden)
    for i in range(count):
        token, place = torch.where(index == i)
        if len(token):
            part = run(i, hidden[token]) * weights[token, place, None]
            output.index_add_(0, token, part.to(output.dtype))
    return output


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
            stacked.add_module(part, _linear(linear, getattr(shape, size)))
        block.set_submodule(merged.name, stacked)
    if family.own_attention:
        inner = block.get_submodule(family.attention)
        block.set_submodule(family.attention, InnerAttention(inner, family, shape, attention))
    if family.experts:
        fused = block.get_submodule(family.experts)
        like = next(fused.parameters())
        experts = (Expert(shape.hidden, shape.ffn, fused.act_fn, like) for _ in range(shape.experts))  # type: ignore[arg-type]
        block.set_submodule(family.experts, Experts(experts))
    if family.shared:
        alone: Any = block.get_submodule(family.shared)
        up = alone.up_proj
        shared = Expert(shape.hidden, shape.shared_ffn, alone.act_fn, up.weight, bias=up.bias is not None)
        block.set_submodule(family.shared, shared)
    if family.layer_norm:
        for norm, readers in family.norm_readers.items():
            give_norm_bias(block, norm)
            for linear in (block.get_submodule(name) for name in readers):
                assert isinstance(linear, nn.Linear)
                if linear.bias is None:
                    linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)
    return block


def _groups(merged: Merged, shape: Shape) -> int:
    return int(getattr(shape, merged.groups)) if merged.groups else 1


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
                sizes = [getattr(shape, size) // groups for size in merged.parts.values()]
                pieces = tensor.unflatten(0, (groups, -1)).split(sizes, 1)
                names = (f"{merged.name}.{part}.{kind}" for part in merged.parts)
                result.update(zip(names, (piece.flatten(0, 1) for piece in pieces), strict=True))
    if family.fused and f"{family.experts}.gate_up_proj" in result:
        both, down = (result.pop(f"{family.experts}.{part}_proj") for part in ("gate_up", "down"))
        # The hub's are (experts, in, out), and those that transformers saves anew (experts, out, in), as it computes.
        if _turned(both.shape, down.shape, shape):
            both, down = both.mT, down.mT
        for i in range(shape.experts):
            parts = (*both[i].split(shape.ffn), down[i])
            names = (f"{projection}.weight" for projection in family.expert(i))
            result.update((name, part.contiguous()) for name, part in zip(names, parts, strict=True))
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
    """The tensors of a checkpoint, of those that the model has, every expert by itself; see `on_disk`."""
    result = {}
    for name, size in shapes.items():
        if family.experts and f"{family.experts}." in name:
            continue
        result[name] = size
    wide, tall = torch.Size((shape.ffn, shape.hidden)), torch.Size((shape.hidden, shape.ffn))
    for block in (index for index in range(shape.blocks) if family.at(index).experts):
        for i in range(family.expert_count):
            for projection, size in zip(family.expert(i), (wide, wide, tall), strict=True):
                result[f"{family.layers}.{block}.{projection}.weight"] = size
    return result


def on_disk(
    expected: Mapping[str, torch.Size], family: Family, shape: Shape, found: Callable[[str], tuple[int, ...]]
) -> Mapping[str, torch.Size]:
    """`expected_shapes` as files have them, which may hold all experts of a block together, either way round.

    `found` gives the shape of a tensor in the files, () where there is none.
    """
    mixtures = [index for index in range(shape.blocks) if family.at(index).experts]
    if not family.fused or not any(found(f"{family.layers}.{i}.{family.experts}.gate_up_proj") for i in mixtures):
        return expected
    result = {name: size for name, size in expected.items() if f".{family.experts}." not in name}
    for block in mixtures:
        stem = f"{family.layers}.{block}.{family.experts}"
        names = both, down = f"{stem}.gate_up_proj", f"{stem}.down_proj"
        turned = _turned(found(both), found(down), shape)
        for name, (rows, columns) in zip(names, _fused_sizes(shape), strict=True):
            result[name] = torch.Size((shape.experts, columns, rows) if turned else (shape.experts, rows, columns))
    return result


def _fused_sizes(shape: Shape) -> tuple[tuple[int, int], tuple[int, int]]:
    """Outputs and inputs of gate and up together, and of down."""
    return (2 * shape.ffn, shape.hidden), (shape.hidden, shape.ffn)


def _turned(both: tuple[int, ...], down: tuple[int, ...], shape: Shape) -> bool:
    """Whether fused experts are (experts, in, out): both tensors say it together, since one of them may be square."""
    return (tuple(both[:0:-1]), tuple(down[:0:-1])) == _fused_sizes(shape)


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
