"""What an estimate goes by: the sizes of a decoder, what is solved in a block, and what a recipe asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...boa.online.activations import SEARCHED, tries
from ...boa.solver.rounding_settings import Settings
from ...models.decoder import Decoder
from ...models.shape import Shape
from ..recipe.recipe import Recipe
from ..recipe.settings import moves_head, settings_of


@dataclass(frozen=True)
class Sizes:
    """A decoder as an estimate sees it.

    Attributes:
        shape: its sizes.
        gated: whether the MLP has a gate beside up.
        routed: experts that a token goes to; 1 without experts.
        windows: of each block how many tokens a token sees; None: all before it.
        tied: whether embedding and head of the finished model are one matrix.
    """

    shape: Shape
    gated: bool = True
    routed: int = 1
    windows: tuple[int | None, ...] = ()
    tied: bool = False

    @classmethod
    def of(cls, decoder: Decoder) -> Sizes:
        """Those of a decoder."""
        family, shape = decoder.family, decoder.shape
        routed = int(getattr(decoder.config, "num_experts_per_tok", 1)) if family.experts else 1
        return cls(shape, bool(family.gate), routed, tuple(decoder.window(index) for index in range(shape.blocks)))

    def kinds(self) -> list[Sizes]:
        """Of each kind of block, as many of it as there are: mixtures, and dense ones among them."""
        dense = sorted(self.shape.dense_blocks)
        if not dense:
            return [self]
        alone = replace(self.shape.at(dense[0]), blocks=len(dense), dense_blocks=frozenset())
        rest = replace(self.shape, blocks=self.shape.blocks - len(dense), dense_blocks=frozenset())
        kinds = [replace(self, shape=alone, routed=1), replace(self, shape=rest)]
        return [kind for kind in kinds if kind.shape.blocks]

    @property
    def inputs(self) -> int:
        """Projections that read the MLP's norm, of one expert."""
        return 2 if self.gated else 1

    def weights(self, experts: int) -> int:
        """Quantized weights of a block with so many experts: h (2 q + 2 k), and 3 h f (2 without a gate) of each."""
        s = self.shape
        ffn = s.ffn * experts + s.shared_ffn
        return 2 * s.hidden * (s.query_width + s.key_width) + (self.inputs + 1) * s.hidden * ffn

    @property
    def block_weights(self) -> int:
        """Quantized weights of a block; where there are several kinds, of the largest."""
        return max(kind.weights(max(kind.shape.experts, 1)) for kind in self.kinds())


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


def problems(sizes: Sizes) -> Iterator[Stack]:
    """What is solved in one block, in its order; all blocks are alike."""
    s = sizes.shape
    experts = max(s.experts, 1)
    yield Stack("query and key", s.query_heads + s.key_heads, s.head_dim, s.hidden, 1, True, "residual")
    yield Stack("value", s.key_heads, s.head_dim, s.hidden, s.key_heads, True, "drift")
    yield Stack("output", 1, s.hidden, s.query_width)
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
