"""Where each architecture keeps its parts: a table of data, one row a `model_type` of transformers.

A decoder block is `h + attention(norm(h))`, then `h + mlp(norm(h))`; families with post norms have one more norm on
each branch before it is added. Names are relative to the model (`embedding`, `layers`, ...) or to one block (`query`,
`down`, ...). Where transformers keeps several projections in one tensor, the names are those of `layout.split_modules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError

SITES = ("qkv", "output", "gate_up", "down")
"""The inputs of a block's linear layers: of Q, K and V; of the output projection; of gate and up; of down."""


@dataclass(frozen=True)
class Merged:
    """One linear layer of a block whose rows are several projections, and the `Shape` field that sizes each."""

    name: str
    parts: Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        rotary: module that gives cosine and sine; None where positions are learned. `rope_by_layer`: it has one set
            of frequencies a kind of layer.
        positions: learned positions; position i is row i + `position_offset`.
        scaled_embedding: the embedding is multiplied by the square root of the hidden size.
        norm_offset: what RMSNorm adds to the stored weight: 0 for `w * x`, 1 for Gemma's `(1 + w) * x`.
        layer_norm: norms are LayerNorm with weight and bias.
        attention_post_norm, mlp_post_norm: norms of a branch, before it is added to the residual stream.
        query_norm, key_norm: RMSNorm of each head's queries and keys, before RoPE.
        gate, mlp: "" where the MLP has no gate, no module of its own; `activation` is then what follows `up`.
        bos: text begins with BOS: without it Gemma's are other models, while papers' figures of the others have none.
        window: "all" or "layers" (those of the config's `layer_types`) slide over `sliding_window` tokens.
        merged: linear layers that hold several projections.
        experts, router: modules of a mixture; `gate`, `up` and `down` then have `{}` in place of the expert.
        ffn_field, experts_field: names of these sizes in the config.
        expert_count: how many experts a block has; 0 in the table, see `family_for`.
        renamed: (pattern, replacement) from names on disk to those of the modules.
        legal: config field -> the values that are supported; a str is the name of another field that it must equal.
        ignored: tensors of a block that are in some checkpoints (Llama 1 and 2) and follow from the config.
    """

    model_type: str
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    rotary: str | None = "model.rotary_emb"
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
    activation: str = ""
    norm_offset: float = 0.0
    layer_norm: bool = False
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    positions: str | None = None
    position_offset: int = 0
    scaled_embedding: bool = False
    rope_by_layer: bool = False
    bos: bool = False
    window: str | None = None
    merged: tuple[Merged, ...] = ()
    experts: str | None = None
    router: str | None = None
    ffn_field: str = "intermediate_size"
    experts_field: str | None = None
    expert_count: int = 0
    renamed: tuple[tuple[str, str], ...] = ()
    legal: Mapping[str, tuple[Any, ...] | str] | None = None
    ignored: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)

    def expert(self, index: int) -> tuple[str, str, str]:
        """Gate, up and down of one expert."""
        return self.gate.format(index), self.up.format(index), self.down.format(index)

    @property
    def mlp_inputs(self) -> tuple[str, ...]:
        """The quantized layers that read the MLP's norm."""
        if self.experts:
            return tuple(name for i in range(self.expert_count) for name in self.expert(i)[:2])
        return (self.gate, self.up) if self.gate else (self.up,)

    @property
    def downs(self) -> tuple[str, ...]:
        """The layers that write the MLP's output: one, or one an expert."""
        return tuple(self.expert(i)[2] for i in range(self.expert_count)) if self.experts else (self.down,)

    @property
    def sites(self) -> dict[str, str]:
        """Each quantized projection of a block, in the order they compute, and the site whose transform it reads."""
        names = {self.query: "qkv", self.key: "qkv", self.value: "qkv", self.output: "output"}
        if not self.experts:
            return names | dict.fromkeys(self.mlp_inputs, "gate_up") | {self.down: "down"}
        for i in range(self.expert_count):
            names |= dict(zip(self.expert(i), ("gate_up", "gate_up", "down"), strict=True))
        return names

    @property
    def projections(self) -> tuple[str, ...]:
        """The linear layers of a block that are quantized, in the order they compute."""
        return tuple(self.sites)

    @property
    def post_norms(self) -> bool:
        """Whether a branch is normalised before it is added to the residual stream.

        Its weight multiplies the channels of what is added, so no rotation of the stream can be folded into the layers
        around it: R1 then turns the inputs of the readers, online, and leaves the stream as it is.
        """
        return self.attention_post_norm is not None


_GEMMA2 = Family(
    "gemma2",
    mlp_norm="pre_feedforward_layernorm",
    norm_offset=1.0,
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    scaled_embedding=True,
    bos=True,
    window="layers",
    legal={"use_bidirectional_attention": (False, None)},
)
_EXPERTS = Family(
    "",
    gate="mlp.experts.{}.gate_proj",
    up="mlp.experts.{}.up_proj",
    down="mlp.experts.{}.down_proj",
    experts="mlp.experts",
    router="mlp.gate",
    window="all",
)
_ROWS = (
    Family("llama"),
    Family("mistral", window="all"),
    Family("qwen2", window="layers"),
    Family("qwen3", window="layers", query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
    Family(
        "phi3",
        query="self_attn.qkv_proj.query",
        key="self_attn.qkv_proj.key",
        value="self_attn.qkv_proj.value",
        gate="mlp.gate_up_proj.gate",
        up="mlp.gate_up_proj.up",
        window="all",
        merged=(
            Merged("self_attn.qkv_proj", {"query": "query_width", "key": "key_width", "value": "key_width"}),
            Merged("mlp.gate_up_proj", {"gate": "ffn", "up": "ffn"}),
        ),
    ),
    Family(
        "opt",
        embedding="model.decoder.embed_tokens",
        layers="model.decoder.layers",
        rotary=None,
        final_norm="model.decoder.final_layer_norm",
        attention_norm="self_attn_layer_norm",
        output="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        mlp="",
        gate="",
        up="fc1",
        down="fc2",
        activation="activation_fn",
        layer_norm=True,
        positions="model.decoder.embed_positions",
        position_offset=2,
        ffn_field="ffn_dim",
        legal={
            "word_embed_proj_dim": "hidden_size",
            "do_layer_norm_before": (True,),
            "enable_bias": (True,),
            "layer_norm_elementwise_affine": (True,),
            "_remove_final_layer_norm": (False,),
        },
    ),
    _GEMMA2,
    replace(
        _GEMMA2,
        model_type="gemma3_text",
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        rope_by_layer=True,
        # Its attention ignores the field, so a model that sets it would not be the one that was trained.
        legal={"use_bidirectional_attention": (False, None), "attn_logit_softcapping": (None,)},
    ),
    replace(
        _EXPERTS,
        model_type="mixtral",
        experts_field="num_local_experts",
        renamed=(
            (r"\.block_sparse_moe\.gate\.", ".mlp.gate."),
            (r"\.block_sparse_moe\.experts\.(\d+)\.w1\.", r".mlp.experts.\1.gate_proj."),
            (r"\.block_sparse_moe\.experts\.(\d+)\.w3\.", r".mlp.experts.\1.up_proj."),
            (r"\.block_sparse_moe\.experts\.(\d+)\.w2\.", r".mlp.experts.\1.down_proj."),
        ),
    ),
    replace(
        _EXPERTS,
        model_type="qwen3_moe",
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        ffn_field="moe_intermediate_size",
        experts_field="num_experts",
        legal={"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    ),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ROWS}

# What is near to a supported architecture, and why it is not one.
_REASONS = {
    "gemma3": "it reads images too: give the checkpoint of its text part alone (gemma3_text)",
    "gemma": "it has no row yet, while gemma2 and gemma3_text have",
    "gpt_oss": "its attention has sinks",
    "qwen2_moe": "its experts are joined by a shared one",
    "qwen3_next": "its attention is linear in most layers",
    "deepseek_v2": "its attention compresses keys and values",
    "deepseek_v3": "its attention compresses keys and values",
}


def family_of(model_type: str, source: str) -> Family:
    """The row of `model_type`; `source` names the model in the error.

    Raises:
        InputError: no row has this type.
    """
    if model_type not in FAMILIES:
        reason = f" ({_REASONS[model_type]})" if model_type in _REASONS else ""
        raise InputError(
            f"{source} is a '{model_type}' model, which is not supported{reason}; supported architectures: "
            f"{', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]


def family_for(config: Any, source: str) -> Family:
    """The row of a transformers config with what the config adds to it; `source` names the model in errors.

    Raises:
        InputError: no row has its type, or the config asks for a variant that is not supported.
    """
    family = family_of(config.model_type, source)
    for field, legal in (family.legal or {}).items():
        value = getattr(config, field, None)
        values = (getattr(config, legal, None),) if isinstance(legal, str) else legal
        if value not in values:
            wanted = f"{legal} ({values[0]})" if isinstance(legal, str) else str(values[0])
            raise InputError(
                f"{source} has {field} {value} in its config.json, and '{family.model_type}' models are supported "
                f"with {wanted} alone: choose another model of the family."
            )
    count = int(getattr(config, family.experts_field)) if family.experts_field else 0
    return replace(family, expert_count=count)
