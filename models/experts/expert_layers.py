"""The modules that take the place of transformers' experts, each with linear layers of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate


class ClampedGate(nn.Module):
    """What gpt-oss makes of gate and up: `(up + 1) * gate * sigmoid(alpha * gate)`, both within `limit`."""

    def __init__(self, alpha: float, limit: float) -> None:
        super().__init__()
        self.alpha, self.limit = alpha, limit

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Both (tokens, ffn) -> the same; the gate has an upper bound alone."""
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(gate * self.alpha)


class Expert(nn.Module):
    """One expert: `down(act(gate(x)) * up(x))`, or with a `ClampedGate`; `bias`: each of the three has one."""

    def __init__(self, hidden: int, ffn: int, activation: nn.Module, like: Tensor, *, bias: bool = False) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": bias, "device": like.device, "dtype": like.dtype}
        self.gate_proj = nn.Linear(hidden, ffn, **options)
        self.up_proj = nn.Linear(hidden, ffn, **options)
        self.down_proj = nn.Linear(ffn, hidden, **options)
        self.act_fn = activation

    def inside(self, x: Tensor) -> Tensor:
        """The input of the down projection, (tokens, ffn)."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        hidden: Tensor = self.act_fn(gate, up) if isinstance(self.act_fn, ClampedGate) else self.act_fn(gate) * up
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, hidden) -> the same."""
        output: Tensor = self.down_proj(self.inside(x))
        return output


class MergedExpert(nn.Module):
    """An expert whose gate and up are one layer, in parts that read the same: `layout.Stacked`."""

    def __init__(self, input_linear: nn.Module, output_linear: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.input_linear, self.output_linear, self.act_fn = input_linear, output_linear, activation

    @property
    def down_proj(self) -> Any:
        """As of `Expert`."""
        return self.output_linear

    def inside(self, x: Tensor) -> Tensor:
        """The input of the down projection, (..., ffn)."""
        gate, up = self.input_linear(x).chunk(2, -1)
        hidden: Tensor = self.act_fn(gate) * up
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) -> the same."""
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


class ScoredExperts(nn.ModuleList):
    """Experts that are given all tokens each, times the token's score, which is 0 for most: Llama 4's."""

    def forward(self, scored: Tensor) -> Tensor:
        """(experts * tokens, hidden) -> the same; an expert without biases puts out 0 for what is 0."""
        found = []
        for expert, x in zip(self, scored.unflatten(0, (len(self), -1)), strict=True):
            token = torch.where(x.any(-1))[0] if not x.is_meta else torch.arange(len(x), device="meta")
            found.append(torch.zeros_like(x).index_copy(0, token, expert(x[token])) if len(token) else x)
        return torch.cat(found)


def sum_of_experts(
    count: int,
    run: Callable[[int, Tensor], Tensor],
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    *,
    scored: bool = False,
) -> Tensor:
    """As of `Experts`, of so many; `run` is what an expert computes of its tokens.

    `scored`: the weights multiply what it is given, and not what it puts out. Without data, where shapes alone are
    computed, every expert has all tokens.
    """
    output = torch.zeros_like(hidden)
    for i in range(count):
        token, place = torch.where(index == i) if not index.is_meta else index.new_zeros(2, len(hidden)).unbind()
        if len(token):
            p = weights[token, place, None]
            part = run(i, hidden[token] * p) if scored else run(i, hidden[token]) * p
            output.index_add_(0, token, part.to(output.dtype))
    return output


def split_experts(fused: Any, hidden: int, ffn: int, *, bias: bool, scored: bool = False) -> Experts | ScoredExperts:
    """Experts of their own in place of a module of transformers that has all in two tensors; without its weights."""
    activation = getattr(fused, "act_fn", None) or ClampedGate(fused.alpha, fused.limit)
    like = next(fused.parameters())
    experts = (Expert(hidden, ffn, activation, like, bias=bias) for _ in range(fused.num_experts))
    return ScoredExperts(experts) if scored else Experts(experts)


def is_plain(module: nn.Module) -> bool:
    """Whether a module of transformers has experts in two tensors, gates and ups end to end, and computes as `Experts`.

    By what `use_experts_implementation` says of it, which any of transformers' implementations may compute.
    """
    told = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    told["has_post_expert_norm"] = False
    apply_gate = getattr(type(module), "_apply_gate", None)
    return all(getattr(module, name, None) is value for name, value in told.items()) and (
        apply_gate is _default_apply_gate and getattr(module, "gate_up_proj", torch.empty(0)).ndim == 3
    )
