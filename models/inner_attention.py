"""Attention for classes of transformers that compute it inside themselves, and take no function for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .family import Family
from .shape import Shape


class InnerAttention(nn.Module):
    """Takes the place of such a module, with its parts: the same, by an attention function of transformers.

    Its queries, keys and values are layers of their own by now; keys that all heads of a group share are not repeated.

    Args:
        inner: the module.
        family: `alibi` says where a bias comes in.
        shape: of the block.
        function: name of the attention function, which is given the bias of each key as `key_bias` too; SDPA where
            transformers has no function by this name.
    """

    is_causal = True

    def __init__(self, inner: nn.Module, family: Family, shape: Shape, function: str) -> None:
        super().__init__()
        for name, child in inner.named_children():
            self.add_module(name, child)
        self.layer_idx, self.function, self.alibi = inner.layer_idx, function, family.alibi
        self.head_dim, self.num_key_value_groups = shape.head_dim, shape.query_heads // shape.key_heads
        self._names = [
            name.removeprefix(f"{family.attention}.")
            for name in (family.query, family.key, family.value, family.output)
        ]

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        alibi: Tensor | None = None,
        attention_mask: Tensor | None = None,
        layer_past: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """As of the modules of BLOOM and Falcon.

        Args:
            hidden_states: (batch, length, hidden).
            residual: what the output is added to.
            alibi: of every key, in any shape of (batch or 1, heads, 1, keys).
            attention_mask: (batch, 1 or heads, length, keys), of booleans or of numbers to add; None is causal.
            layer_past: the cache.
            position_embeddings: cosine and sine of RoPE, where there is no ALiBi.

        Returns:
            (batch, length, hidden), and no probabilities.
        """
        *projections, output = (self.get_submodule(name) for name in self._names)
        query, key, value = (p(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        if self.alibi:
            assert alibi is not None
            alibi = alibi.reshape(-1, query.shape[1], 1, alibi.shape[-1]).to(query.dtype)
            alibi = alibi * self.head_dim**-0.5 if self.alibi == "products" else alibi
        elif position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        if alibi is not None:
            attention_mask = self._with_bias(attention_mask, alibi, query.shape[2])
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.function, sdpa_attention_forward)
        mixed, _ = function(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5, key_bias=alibi)
        written: Tensor = output(mixed.flatten(2))
        return (written if residual is None else written + residual), None

    def _with_bias(self, mask: Tensor | None, bias: Tensor, length: int) -> Tensor:
        """A mask of numbers (batch, heads, length, keys) that adds the bias of each key (batch, heads, 1, keys)."""
        if mask is not None and mask.dtype != torch.bool:
            return mask if self.alibi == "products" else mask + bias  # Falcon's model has put it there
        if mask is None and length == 1:
            return bias
        if mask is None:
            mask = torch.ones(length, bias.shape[-1], dtype=torch.bool, device=bias.device).tril_()
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
