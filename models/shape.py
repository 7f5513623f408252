"""The sizes of a decoder, read from its config."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from .families import FAMILIES, dense_blocks, has_row, variant_of


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder, all in elements; `ffn` is that of one expert where there are `experts`.

    `shared_ffn` is that of the expert that all tokens go to, 0 without one; `dense_ffn` that of the `dense_blocks`,
    which have an MLP in place of experts.
    """

    blocks: int
    hidden: int
    ffn: int
    query_heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    experts: int = 0
    shared_ffn: int = 0
    dense_ffn: int = 0
    dense_blocks: frozenset[int] = frozenset()

    def at(self, index: int) -> Shape:
        """That of block `index`, as `Family.at` has its layers."""
        if index not in self.dense_blocks or not self.experts:
            return self
        return replace(self, ffn=self.dense_ffn, experts=0, shared_ffn=0)

    @property
    def ffn_sizes(self) -> dict[str, int]:
        """The widths that inputs of down projections have, by what they are called."""
        dense = len(self.dense_blocks)
        sizes = {
            "ffn size": (self.ffn, dense < self.blocks or not dense),
            "shared expert's ffn size": (self.shared_ffn, bool(self.shared_ffn)),
            "dense blocks' ffn size": (self.dense_ffn, bool(dense)),
        }
        return {name: size for name, (size, there) in sizes.items() if there}

    @property
    def query_width(self) -> int:
        """Of all query heads together."""
        return self.query_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Of all key heads together, or of all value heads."""
        return self.key_heads * self.head_dim

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read the sizes from a transformers config, with the defaults of Llama where a field is missing."""
        if not has_row(config):
            return cls._of_unknown(config)
        row = FAMILIES[config.model_type]
        config = row.text(config)
        row = variant_of(row, config)
        key_heads = row.key_heads if isinstance(row.key_heads, int) else getattr(config, row.key_heads, None)
        hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
        sizes = row.measured(config) if row.measured else {}
        return cls(
            blocks=int(config.num_hidden_layers),
            hidden=hidden,
            ffn=int(sizes[row.down][1] if row.down in sizes else getattr(config, row.ffn_field, None) or 4 * hidden),
            query_heads=heads,
            key_heads=int(key_heads or heads),
            head_dim=int(getattr(config, row.head_field, None) or hidden // heads),
            vocabulary=int(config.vocab_size),
            experts=int(getattr(config, row.experts_field)) if row.experts_field else 0,
            shared_ffn=math.prod(int(getattr(config, field)) for field in row.shared_fields) if row.shared else 0,
            dense_ffn=int(getattr(config, row.dense_field)) if row.dense else 0,
            dense_blocks=dense_blocks(row, config),
        )

    @classmethod
    def _of_unknown(cls, config: Any) -> Shape:
        """Of a type without a row, which may have no heads: what is not there, or not one number, is a guess."""

        def number(field: str, otherwise: int) -> int:
            value = getattr(config, field, None)
            return value if isinstance(value, int) and value > 0 else otherwise

        from .generic.generic_family import generic_family  # which needs no shape

        family, hidden = generic_family(config, "the model"), int(config.hidden_size)
        heads = number("num_attention_heads", 1)
        inside = family.sizes[family.expert(0)[2]][1] if family.experts and family.sizes else None
        return cls(
            blocks=int(config.num_hidden_layers),
            hidden=hidden,
            ffn=inside or number("intermediate_size", 4 * hidden),
            query_heads=heads,
            key_heads=number("num_key_value_heads", heads),
            head_dim=number("head_dim", hidden // heads),
            vocabulary=int(config.vocab_size),
            experts=family.expert_count,
        )
