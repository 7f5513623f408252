"""Where each architecture keeps its parts: a table of data, one row a `model_type` of transformers.

A decoder block is `h + attention(norm(h))`, then `h + mlp(norm(h))`. Names are relative to the model (`embedding`,
`layers`, ...) or to one block (`query`, `down`, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class Family:
    """One architecture.

    `norm_offset` is what its RMSNorm adds to the stored weight: 0 for `w * x`, 1 for Gemma's `(1 + w) * x`.
    `ignored` tensors of a block are in some checkpoints (Llama 1 and 2) and follow from the config.
    """

    model_type: str
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    rotary: str = "model.rotary_emb"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    attention: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    norm_offset: float = 0.0
    ignored: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)

    @property
    def projections(self) -> tuple[str, ...]:
        """The linear layers of a block that are quantized, in the order they compute."""
        return (self.query, self.key, self.value, self.output, self.gate, self.up, self.down)


FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (Family("llama"),)}


def family_of(model_type: str, source: str) -> Family:
    """The row of `model_type`; `source` names the model in the error.

    Raises:
        InputError: no row has this type.
    """
    if model_type not in FAMILIES:
        raise InputError(
            f"{source} is a '{model_type}' model, which is not supported; supported architectures: "
            f"{', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder, all in elements."""

    blocks: int
    hidden: int
    ffn: int
    query_heads: int
    key_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: object) -> Shape:
        """Read the sizes from a transformers config, with the defaults of Llama where a field is missing."""
        hidden = int(config.hidden_size)  # type: ignore[attr-defined]
        heads = int(config.num_attention_heads)  # type: ignore[attr-defined]
        return cls(
            blocks=int(config.num_hidden_layers),  # type: ignore[attr-defined]
            hidden=hidden,
            ffn=int(config.intermediate_size),  # type: ignore[attr-defined]
            query_heads=heads,
            key_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
            vocabulary=int(config.vocab_size),  # type: ignore[attr-defined]
        )
