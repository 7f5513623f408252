"""One architecture: the names of its modules, and what is special about it, as data.

A decoder block is `h + attention(norm(h))`, then `h + mlp(norm(h))`; families with post norms have one more norm on
each branch before it is added. Names are relative to the model (`embedding`, `layers`, ...) or to one block (`query`,
`down`, ...). Where transformers keeps several projections in one tensor, the names are those of `layout.split_modules`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from .rows.row_parts import Merged, Sight, Variant


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        rotary: module that gives cosine and sine; None where positions are learned. `rope_by_layer`: it has one set
            of frequencies a kind of layer. `rope_layers`: the config field that says by layer whether it turns queries
            and keys at all, by 1 or "sliding_attention"; "" where every layer does, "none" where none does.
            `rope_halves`: it gives each angle once, where Llama's gives it for both channels that it turns.
            `rope_neighbours`: it turns channel 2 j with 2 j + 1, where Llama's turns j with j + half.
        positions: learned positions; position i is row i + `position_offset`.
        scaled_embedding: the embedding is multiplied by the square root of the hidden size.
        embedding_factor, branch_factor, logits_divisor, logits_factor: names of these numbers in the config; a branch
            is what is added to the residual stream.
        embedding_norm, embedding_epsilon: LayerNorm of the embedding's rows, and its epsilon's name in the config. It
            is computed where they are read from a checkpoint, and is no part of a quantized model.
        norm_offset: what RMSNorm adds to the stored weight: 0 for `w * x`, 1 for Gemma's `(1 + w) * x`.
        pre_norms: false where attention and MLP read the stream itself; `layout.split_modules` then puts an identity
            where `attention_norm` and `mlp_norm` say.
        layer_norm: norms are LayerNorm with weight and bias; where a norm, or a layer that reads one, has no bias,
            `layout.split_modules` gives it one of zeros, so that there is room for what is folded.
        parallel: attention and MLP read the same stream, and both are added to it; `mlp_norm` may then be
            `attention_norm`.
        alibi: what gets a bias by the distance of tokens, a slope a head, as the `build_alibi_tensor` of the class has
            it: "logits", or "products" of queries and keys, which are scaled to logits with it; "" without.
        own_attention: where the module of attention takes no function, the name by which the class can be made;
            `layout.split_modules` then puts `inner_attention.InnerAttention` in the module's place. "" elsewhere.
        attention_post_norm, mlp_post_norm: norms of a branch, before it is added to the residual stream.
        query_norm, key_norm: RMSNorm of each head's queries and keys, before RoPE; where both are one it has no weight.
            `head_norms_last`: after RoPE. `head_norms_whole`: over all heads together.
        gate, mlp: "" where the MLP has no gate, no module of its own; `activation` is then what follows `up`.
        bos: text begins with BOS: without it Gemma's are other models, while papers' figures of the others have none.
        window: "all" or "layers" (those of the config's `layer_types`) slide over `sliding_window` tokens; "chunks": a
            "chunked_attention" one sees its own chunk of `attention_chunk_size` tokens alone.
        merged: linear layers that hold several projections.
        experts, router: modules of a mixture; `gate`, `up` and `down` then have `{}` in place of the expert.
            `router_bias`: a buffer that the router is given beside what it reads. `scores_inputs`: a token's weight for
            an expert multiplies what that reads, and not what it puts out.
        shared, shared_gate: the MLP that every token goes to beside its experts, and the layer whose sigmoid weighs it;
            "" where there is none, or no weight. It counts as one expert more, the last. `shared_parts`: its layers.
        dense: whether block `index` of a model with this config has one MLP in place of its mixture; None: no block
            has. `dense_field`: name in the config of that one's width.
        blocks: of each block, where they are of several kinds; see `family_for`.
        fused: on disk the experts of a block may be two tensors, gates and ups end to end; else each is by itself.
            `interleaved`: gates and ups alternate in them. `expert_bias`: each projection of an expert has a bias.
        packed: what a checkpoint's `quant_method` may be: its weights are read as the numbers that they mean.
        linear_up: what `down` reads is linear in what `up` puts out, where there is a gate.
        ffn_field, experts_field, key_heads, head_field: names of these sizes in the config; `key_heads` may be the
            number itself, `head_field` is of values where queries and keys are of another width. What is not there is
            4 * hidden, and as many key heads as there are heads. `shared_fields`: those whose product is the width of
            the shared expert.
        head_bias: the output layer has one.
        expert_count: how many experts a block has; 0 in the table, see `family_for`.
        renamed: (pattern, replacement) from names on disk to those of the modules.
        variants: what is another where the config says so, in order; `families.variant_of` has them in place.
        attention_gate: layer whose sigmoid attention's output is multiplied by, a number a channel, before `output`.
        kinds: by the values of the config's `layer_types`, or of `kind_field`, what blocks of that kind have instead.
        mixed: of a kind without attention: the quantized layers of what stands in its place that read the norm.
            `attention` is then that module, and `query`, `key` and `value` are "".
        compressions: layers that read attention's norm and put out fewer numbers, which norms follow; the last is that
            of keys and values. `latents`: the layers, of `query`, `key` and `value`, that read those.
        kept: further layers that read attention's norm, and stay as they are, as a router does: they decide for how
            long something is remembered.
        measured: rows and columns of layers by the config, where `Shape` does not tell them.
        legal: config field -> the values that are supported; a str is the name of another field that it must equal.
        otherwise_generic: a model that is not so is taken as one without a row, and not refused.
        others, groups: of families without a row, see `generic.generic_family`: further tensors outside the blocks, by
            their full names; the linear layers of a block, those that read one tensor together, in the order in which
            they run.
        sizes: rows and columns of layers whose names say too little: what `measured` has, or of families without a row.
        note: what is special, for `rotoboa models` and docs/models.md.
        sight: of models that see: what they have beside the decoder that this row is of. The names of modules are those
            in the whole model, and the fields of a config those of its `text_config`.
        further_blocks: name in the config of how many blocks a checkpoint has behind the last one, which predict
            further tokens; they are left out.
        exact: how the names of tensors end that are stored in float32, whatever the dtype of the weights.
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
    pre_norms: bool = True
    layer_norm: bool = False
    parallel: bool = False
    alibi: str = ""
    own_attention: str = ""
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    positions: str | None = None
    position_offset: int = 0
    scaled_embedding: bool = False
    embedding_norm: str | None = None
    embedding_epsilon: str = ""
    embedding_factor: str = ""
    branch_factor: str = ""
    logits_divisor: str = ""
    logits_factor: str = ""
    head_norms_last: bool = False
    head_norms_whole: bool = False
    rope_by_layer: bool = False
    rope_layers: str = ""
    rope_halves: bool = False
    rope_neighbours: bool = False
    bos: bool = False
    window: str | None = None
    merged: tuple[Merged, ...] = ()
    experts: str | None = None
    router: str | None = None
    router_bias: str = ""
    scores_inputs: bool = False
    shared: str = ""
    shared_gate: str = ""
    shared_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    dense: Callable[[Any, int], bool] | None = None
    dense_field: str = "intermediate_size"
    blocks: tuple[Family, ...] = ()
    fused: bool = False
    interleaved: bool = False
    expert_bias: bool = False
    packed: str = ""
    linear_up: bool = True
    ffn_field: str = "intermediate_size"
    experts_field: str | None = None
    shared_fields: tuple[str, ...] = ()
    key_heads: str | int = "num_key_value_heads"
    head_field: str = "head_dim"
    head_bias: bool = False
    expert_count: int = 0
    attention_gate: str = ""
    kinds: Mapping[Any, Mapping[str, Any]] | None = None
    kind_field: str = "layer_types"
    mixed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    compressions: tuple[str, ...] = ()
    latents: tuple[str, ...] = ()
    measured: Callable[[Any], Mapping[str, tuple[int, int]]] | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    variants: tuple[Variant, ...] = ()
    legal: Mapping[str, tuple[Any, ...] | str] | None = None
    otherwise_generic: bool = False
    note: str = ""
    others: tuple[str, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    sizes: Mapping[str, tuple[int, int]] | None = None
    sight: Sight | None = None
    further_blocks: str = ""
    exact: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)

    @property
    def generic(self) -> bool:
        """Whether no more is known than linear layers: there is no row."""
        return False

    def text(self, config: Any) -> Any:
        """The config of the decoder, of that of the whole model."""
        found = config if self.sight is None else getattr(config, "text_config", None) or config  # older ones are flat
        return SimpleNamespace(**found) if isinstance(found, dict) else found

    def at(self, index: int) -> Family:
        """The family of block `index`: this one, where all blocks are of one kind."""
        return self.blocks[index] if self.blocks else self

    @property
    def hybrid(self) -> bool:
        """Whether some blocks have something else than attention."""
        return any("mixed" in kind for kind in (self.kinds or {}).values())

    @property
    def all_kinds(self) -> tuple[Family, ...]:
        """One of each kind of block."""
        return tuple({id(block): block for block in self.blocks}.values()) or (self,)

    def layer_names(self, blocks: int) -> list[str]:
        """The full names of the projections of so many blocks, all there are."""
        return [f"{self.layers}.{index}.{name}" for index in range(blocks) for name in self.at(index).projections]

    def expert(self, index: int) -> tuple[str, str, str]:
        """Gate, up and down of one expert; the shared one comes last."""
        if self.shared and index == self.expert_count:
            gate, up, down = (f"{self.shared}.{part}" for part in self.shared_parts)
            return gate, up, down
        return self.gate.format(index), self.up.format(index), self.down.format(index)

    @property
    def all_experts(self) -> range:
        """The numbers of the experts, that of the shared one among them."""
        return range(self.expert_count + bool(self.shared))

    @property
    def shared_down(self) -> str:
        """The layer that writes what the shared expert puts out; "" where there is none."""
        return self.expert(self.expert_count)[2] if self.shared else ""

    @property
    def weighing(self) -> tuple[str, ...]:
        """The layers that read the MLP's norm and weigh experts."""
        return tuple(name for name in (self.router, self.shared_gate) if name)

    @property
    def deciders(self) -> tuple[str, ...]:
        """The layers that read a norm and are never quantized, nor turned behind it: these, and what is `kept`."""
        return (*self.kept, *self.weighing)

    @property
    def mlp_inputs(self) -> tuple[str, ...]:
        """The quantized layers that read the MLP's norm."""
        if self.experts:
            return tuple(name for i in self.all_experts for name in self.expert(i)[:2])
        return (self.gate, self.up) if self.gate else (self.up,)

    @property
    def attention_inputs(self) -> tuple[str, ...]:
        """The quantized layers that read the norm of attention, or of what stands in its place."""
        gate = (self.attention_gate,) if self.attention_gate else ()
        plain = (name for name in (self.query, self.key, self.value) if name not in self.latents)
        return self.mixed or (*self.compressions, *plain, *gate)

    @property
    def has_values(self) -> bool:
        """Whether what `output` reads is, channel by channel, an average of values: rotations of heads pass it then."""
        return not self.mixed and not self.attention_gate

    @property
    def norm_readers(self) -> dict[str, tuple[str, ...]]:
        """The linear layers that read each norm of a block; `deciders` read what those beside them read."""
        readers: dict[str, tuple[str, ...]] = {self.attention_norm: (*self.attention_inputs, *self.kept)}
        readers[self.mlp_norm] = (*readers.get(self.mlp_norm, ()), *self.weighing, *self.mlp_inputs)
        return readers

    @property
    def shared_norm(self) -> bool:
        """Whether attention and MLP read one norm."""
        return self.attention_norm == self.mlp_norm

    @property
    def downs(self) -> tuple[str, ...]:
        """The layers that write the MLP's output: one, or one an expert."""
        return tuple(self.expert(i)[2] for i in self.all_experts) if self.experts else (self.down,)

    @property
    def sites(self) -> dict[str, str]:
        """Each quantized projection of a block, in the order they compute, and the site whose transform it reads."""
        names = {**dict.fromkeys(self.attention_inputs, "qkv"), **dict.fromkeys(self.latents, "latent")}
        names[self.output] = "output"
        if not self.experts:
            return names | dict.fromkeys(self.mlp_inputs, "gate_up") | {self.down: "down"}
        for i in self.all_experts:
            names |= dict(zip(self.expert(i), ("gate_up", "gate_up", "down"), strict=True))
        return names

    @property
    def projections(self) -> tuple[str, ...]:
        """The linear layers of a block that are quantized, in the order they compute."""
        return tuple(self.sites)

    @property
    def post_norms(self) -> bool:
        """Whether a branch is normalised before it is added to the residual stream.

        R1 can then only run online: the norm's weight is by channel.
        """
        return self.attention_post_norm is not None
