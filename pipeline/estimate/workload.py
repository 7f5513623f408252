"""What an estimate goes by: the sizes of a decoder, what is solved in a block, and what a recipe asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...boa.online.activations import SEARCHED, tries
from ...boa.solver.rounding_settings import Settings
from ...export.finished import projection_columns, projection_rows
from ...models.decoder import Decoder
from ...models.shape import Shape
from ..recipe.recipe import Recipe
from ..recipe.settings import has_directions, moves_head, settings_of

_ROUTED = ("num_experts_per_tok", "moe_k", "experts_per_token")
"""What configs call how many experts a token goes to."""


@dataclass(frozen=True)
class Stack:
    """Projections that share an input and are solved together, as `boa.block.solving` stacks them.

    Attributes:
        heads, rows, columns: r rows of c columns for each head.
        hessians: 1 or one for each head.
        tied: whether H_out ties the rows of a head.
        shift: what the target is moved by: a "residual" of the inputs, outputs that are "wanted", or a "drift".
        count: how many there are in a block; more than one of experts.
    """

    name: str
    heads: int
    rows: int
    columns: int
    hessians: int = 1
    tied: bool = False
    shift: str = "wanted"
    count: int = 1

    @property
    def all_rows(self) -> int:
        """Of all heads."""
        return self.heads * self.rows


class Attention(NamedTuple):
    """What is before the MLP of a block, where that is not attention as the shape has it.

    `keys`: operations of a token for each key that it sees; 0 where it sees none, as where attention has no place.
    """

    stacks: tuple[Stack, ...]
    keys: int


@dataclass(frozen=True)
class Sizes:
    """A decoder as an estimate sees it.

    Attributes:
        shape: its sizes.
        gated: whether the MLP has a gate beside up.
        routed: experts that a token goes to; 1 without experts.
        windows: of each block how many tokens a token sees; None: all before it.
        tied: whether embedding and head of the finished model are one matrix.
        attention: of each block what is before its MLP; None: attention as the shape has it.
    """

    shape: Shape
    gated: bool = True
    routed: int = 1
    windows: tuple[int | None, ...] = ()
    tied: bool = False
    attention: tuple[Attention | None, ...] = ()

    @classmethod
    def of(cls, decoder: Decoder) -> Sizes:
        """Those of a decoder."""
        family, shape = decoder.family, decoder.shape
        fields = (getattr(decoder.config, name, None) for name in _ROUTED)
        routed = next((int(value) for value in fields if value), 1) if family.experts else 1
        blocks = range(shape.blocks)
        attention = tuple(_attention(decoder, index) for index in blocks)
        return cls(
            shape,
            bool(family.gate),
            routed,
            tuple(decoder.window(index) or decoder.chunk(index) for index in blocks),
            attention=attention if any(attention) else (),
        )

    def kinds(self) -> list[Sizes]:
        """Of each kind of block, as many of it as there are: dense ones first, mixtures, and what is before the MLP."""
        found = dict[tuple[bool, Attention | None], list[int]]()
        for index in range(self.shape.blocks):
            mixture = bool(self.shape.experts) and index not in self.shape.dense_blocks
            found.setdefault((mixture, self.attention[index] if self.attention else None), []).append(index)
        if len(found) < 2:
            return [self]
        return [
            self._of(blocks, mixture) for (mixture, _), blocks in sorted(found.items(), key=lambda item: item[0][0])
        ]

    def _of(self, blocks: list[int], mixture: bool) -> Sizes:
        """Of these blocks, which are of one kind."""
        shape = replace(self.shape.at(blocks[0]), blocks=len(blocks), dense_blocks=frozenset())
        windows = tuple(self.windows[index] for index in blocks) if self.windows else ()
        attention = tuple(self.attention[index] for index in blocks) if self.attention else ()
        routed = self.routed if mixture else 1
        return replace(self, shape=shape, routed=routed, windows=windows, attention=attention)

    @property
    def own(self) -> Attention | None:
        """Of one kind of block, what is before its MLP."""
        return self.attention[0] if self.attention else None

    @property
    def attends(self) -> bool:
        """Of one kind, whether tokens see keys."""
        return self.own is None or self.own.keys > 0

    @property
    def mixed(self) -> int:
        """Inputs of the widest output layer behind what stands in attention's place; 0 where there is none."""
        return max((own.stacks[-1].columns for own in self.attention if own and not own.keys), default=0)

    @property
    def inputs(self) -> int:
        """Projections that read the MLP's norm, of one expert."""
        return 2 if self.gated else 1

    def weights(self, experts: int) -> int:
        """Quantized weights of a block with so many experts: before the MLP, and of each 3 h f (2 without a gate)."""
        s = self.shape
        ffn = s.ffn * experts + s.shared_ffn
        return sum(p.all_rows * p.columns for p in before_mlp(self)) + (self.inputs + 1) * s.hidden * ffn

    @property
    def block_weights(self) -> int:
        """Quantized weights of a block; where there are several kinds, of the largest."""
        return max(kind.weights(max(kind.shape.experts, 1)) for kind in self.kinds())


def before_mlp(sizes: Sizes) -> tuple[Stack, ...]:
    """What is solved before the MLP of one kind of block: 2 h (q + k) weights, of plain attention."""
    s = sizes.shape
    if sizes.own is not None:
        return sizes.own.stacks
    return (*_plain(s), Stack("output", 1, s.hidden, s.query_width))


def _plain(s: Shape) -> tuple[Stack, Stack]:
    return (
        Stack("query and key", s.query_heads + s.key_heads, s.head_dim, s.hidden, 1, True, "residual"),
        Stack("value", s.key_heads, s.head_dim, s.hidden, s.key_heads, True, "drift"),
    )


def _attention(decoder: Decoder, index: int) -> Attention | None:
    """Of a block: attention with a gate or with latents, or what stands in its place; None of plain attention."""
    f, s = decoder.family.at(index), decoder.shape
    if not (f.mixed or f.compressions or f.attention_gate):
        return None
    rows, columns = (sizes(decoder.family, s, index) for sizes in (projection_rows, projection_columns))
    output = Stack("output", 1, s.hidden, columns[f.output])
    if f.mixed:
        return Attention(
            (Stack("mixer", 1, sum(rows[name] for name in f.mixed), s.hidden, shift="residual"), output), 0
        )
    if f.attention_gate:
        gate = Stack("gate", s.query_heads, s.head_dim, s.hidden, 1, True, "residual")
        return Attention((*_plain(s), gate, output), 4 * s.query_width)
    down = Stack("compressions", 1, sum(rows[name] for name in f.compressions), s.hidden, shift="residual")
    heads, parts = s.query_heads, {"query": f.query, "key": f.key, "value": f.value}
    readers = (
        Stack(
            what,
            heads,
            rows[name] // heads,
            columns[name],
            heads if drift else 1,
            True,
            "drift" if drift else "residual",
        )
        for what, name in parts.items()
        for drift in (what == "value",)
    )
    return Attention((down, *readers, output), 2 * (rows[f.query] + columns[f.output]))


def problems(sizes: Sizes) -> Iterator[Stack]:
    """What is solved in one block of a kind, in its order."""
    s = sizes.shape
    experts = max(s.experts, 1)
    yield from before_mlp(sizes)
    yield Stack("gate and up", sizes.inputs, s.ffn, s.hidden, shift="residual", count=experts)
    yield Stack("down", 1, s.hidden, s.ffn, count=experts)
    if s.shared_ffn:
        yield Stack("shared gate and up", sizes.inputs, s.shared_ffn, s.hidden, shift="residual")
        yield Stack("shared down", 1, s.hidden, s.shared_ffn)


@dataclass(frozen=True)
class Plan:
    """What a recipe asks for.

    Attributes:
        settings: of the rounding.
        samples, length, batch: of the calibration set, and how many sequences at a time.
        activation_tries, cache_tries: grids that a vector is rounded with; 0 at 16 bits.
        directions: whether leading directions of inputs are looked for.
        references: whether RTN and plain GPTQ are measured beside the method.
        head: whether the output layer is moved.
        windows: of `length` tokens that are evaluated; 0 for none.
        baseline: whether RTN is evaluated too.
        sources: quantizers that are measured alone, and all together; 0 for none.
    """

    settings: Settings
    samples: int
    length: int
    batch: int
    activation_tries: int = 0
    cache_tries: int = 0
    directions: bool = False
    references: bool = False
    head: bool = False
    windows: int = 0
    baseline: bool = True
    sources: int = 0

    @classmethod
    def of(cls, recipe: Recipe, length: int, windows: int | None) -> Plan:
        """That of a recipe, on sequences of `length` tokens; `windows` None is not counted."""
        activations, cache, evaluation = recipe.activations, recipe.cache, recipe.evaluation
        inputs = 4 if activations.bits < 16 else 0
        sources = 2 + inputs + (cache.key_bits < 16) + (cache.value_bits < 16)
        return cls(
            settings_of(recipe),
            recipe.calibration.samples,
            length,
            recipe.calibration.batch,
            _tries(activations.bits, activations.search, activations.symmetric),
            _tries(min(cache.key_bits, cache.value_bits), cache.search, False),
            directions=has_directions(recipe),
            references=evaluation.references,
            head=moves_head(recipe),
            windows=windows or 0,
            baseline=evaluation.baseline,
            sources=sources if evaluation.sources else 0,
        )


def _tries(bits: int, search: bool, symmetric: bool) -> int:
    if bits == 16:
        return 0
    return tries(symmetric) + 1 if search and bits <= SEARCHED else 1
