"""Operations and bytes of a run, counted from sizes alone: what `inspect`, benchmarks/limits.md and scaling.md go by.

A multiplication and an addition are two operations. What is counted is what the arithmetic needs (of a symmetric
product one half, of causal attention the pairs that see each other), and the code's own passes through it. Bytes are
those that cross to memory when every torch operation reads its operands and writes its result once; what the compiled
columns of a block keep in a processor's cache is not among them. Stages have the names of `boa.stopwatch.STAGES`.

Notation: T tokens in sequences of L, a layer of r rows and c columns, H query heads in G groups, d channels a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from ...boa.block.experts_step import POOL
from ...boa.online.activations import RATIOS
from ...models.decoder import Decoder
from ...models.shape import Shape
from ...rotation.hadamard import Hadamard

FLOAT, DOUBLE = 4, 8  # bytes
# How often an element crosses to memory, reads and writes together, in the operations of ...
NORM, GLU, ROPE, ADD, QUANTIZER, WEIGHTED = 7, 5, 11, 3, 12, 4
SOFTMAX = 10  # operations of an attention probability: scale, mask, subtract, exponential, sum, divide


@dataclass(frozen=True)
class Work:
    """Operations by kind, and bytes.

    Attributes:
        products: of float32 matrix products.
        wide: of float64 matrix products, factorisations and triangular solves.
        elements: of everything else that computes in cache: columns one after another, probabilities, grids.
        bytes: to and from memory.
    """

    products: float = 0.0
    wide: float = 0.0
    elements: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Work:
        return Work(*(getattr(self, f.name) * times for f in fields(self)))

    __rmul__ = __mul__

    @property
    def operations(self) -> float:
        """Of all kinds."""
        return self.products + self.wide + self.elements


def total(parts: Iterable[Work]) -> Work:
    """The sum."""
    return sum(parts, Work())


@dataclass(frozen=True)
class Sizes:
    """A decoder as the counts see it.

    Attributes:
        shape: its sizes.
        gated: whether the MLP has a gate beside up.
        routed: experts that a token goes to; 1 without experts.
        windows: of each block how many tokens a token sees; None: all before it.
        post_norms: whether a branch is normed before it is added, so that R1 cannot be merged and runs online.
        tied: whether embedding and head of the finished model are one matrix.
    """

    shape: Shape
    gated: bool = True
    routed: int = 1
    windows: tuple[int | None, ...] = ()
    post_norms: bool = False
    tied: bool = False

    @classmethod
    def of(cls, decoder: Decoder) -> Sizes:
        """Those of a decoder."""
        family, shape = decoder.family, decoder.shape
        routed = int(getattr(decoder.config, "num_experts_per_tok", 1)) if family.experts else 1
        windows = tuple(decoder.window(index) for index in range(shape.blocks))
        return cls(shape, bool(family.gate), routed, windows, family.post_norms)

    def window(self, index: int) -> int | None:
        """That of block `index`."""
        return self.windows[index] if self.windows else None

    @property
    def inputs(self) -> int:
        """Projections that read the MLP's norm, of one expert."""
        return 2 if self.gated else 1

    @property
    def block_weights(self) -> int:
        """Quantized weights of a block: h (2 q + 2 k) and 3 h f (2 without a gate) for each expert."""
        s = self.shape
        mlp = (self.inputs + 1) * s.hidden * s.ffn * max(s.experts, 1)
        return 2 * s.hidden * (s.query_width + s.key_width) + mlp


@dataclass(frozen=True)
class Online:
    """What runs beside the layers: rotations (`r1`: where), whether activations and cache are below 16 bits, and
    whether their vectors choose a clip ratio each.
    """

    r3: bool = False
    r4: bool = False
    activations: bool = False
    cache: bool = False
    search_activations: bool = False
    search_cache: bool = False
    r1: str = "merged"
    heads: bool = False


def pairs(length: int, window: int | None = None) -> int:
    """(query, key) pairs of one sequence: sum over positions l of min(l, w), so L (L + 1) / 2 without a window."""
    w = min(length, window or length)
    return w * (w + 1) // 2 + (length - w) * w


def linear(tokens: float, rows: float, columns: float) -> Work:
    """Y = X W^T: 2 T r c."""
    return Work(2 * tokens * rows * columns, bytes=FLOAT * (tokens * (rows + columns) + rows * columns))


def gram(tokens: float, columns: float, batches: float = 1) -> Work:
    """X^T X, one half of it: T c (c + 1); it is added to the sum in memory once a batch."""
    return Work(tokens * columns * (columns + 1), bytes=FLOAT * (tokens * columns + 2 * batches * columns**2))


def moved(elements: float, passes: float) -> Work:
    """Operations element by element on what no cache holds: only the bytes count."""
    return Work(bytes=FLOAT * elements * passes)


def hadamard(vectors: float, size: int, *, wide: bool = False) -> Work:
    """The fast transform of `size` = base 2^k channels: 2 n (base + the sum of its radices) a vector."""
    factors = Hadamard.of(size).factors
    operations = 2.0 * vectors * size * sum(factors)
    moves = vectors * size * 2 * len(factors)
    return Work(wide=operations, bytes=DOUBLE * moves) if wide else Work(operations, bytes=FLOAT * moves)


def attention(s: Shape, sequences: float, length: int, window: int | None = None) -> Work:
    """Q K^T and A V: 4 H d for each pair, and the softmax, which stays in cache; RoPE moves q and k."""
    seen = sequences * pairs(length, window)
    width = s.query_width + s.key_width
    core = Work(4 * seen * s.query_width, elements=SOFTMAX * seen * s.query_heads)
    return (
        core
        + moved(sequences * length * (width + s.query_width + s.key_width), 1)
        + moved(sequences * length * width, ROPE)
    )


def parts_of_block(sizes: Sizes, sequences: float, length: int, window: int | None = None) -> dict[str, Work]:
    """One pass through a block by part: `norms`, `qk`, `v`, `attention`, `output`, `gate_up`, `down`, `router`.

    Gate, up and down count each token once for each expert it goes to.
    """
    s, tokens = sizes.shape, sequences * length
    active = tokens * sizes.routed
    hidden = moved(active * s.ffn, GLU) + sizes.inputs * linear(active, s.ffn, s.hidden)
    return {
        "norms": moved(tokens * s.hidden, NORM),
        "qk": linear(tokens, s.query_width + s.key_width, s.hidden),
        "v": linear(tokens, s.key_width, s.hidden),
        "attention": attention(s, sequences, length, window),
        "output": linear(tokens, s.hidden, s.query_width) + moved(tokens * s.hidden, ADD),
        "gate_up": hidden,
        "down": linear(active, s.hidden, s.ffn) + moved(tokens * s.hidden, ADD),
        "router": linear(tokens, s.experts, s.hidden) if s.experts else Work(),
    }


PLAIN = {"norms": 2, "qk": 1, "v": 1, "attention": 1, "output": 1, "gate_up": 1, "down": 1, "router": 1}
BOTH = {"norms": 7, "qk": 3, "v": 2, "attention": 2, "output": 2, "gate_up": 2, "down": 2}
EXPERTS = BOTH | {"gate_up": 4, "down": 3, "router": 2}
"""How often each part runs: in a plain pass; in both streams of the quantizer (`quantize_block`), where queries and
keys of the quantized one are needed before and after they are quantized; and with experts, whose full-precision outputs
are needed for the stream before each of them is solved."""


def forward(sizes: Sizes, sequences: float, length: int, window: int | None = None) -> Work:
    """One plain pass of `sequences` through a block: 2 T r c of each layer, 4 H d of each pair."""
    parts = parts_of_block(sizes, sequences, length, window)
    return total(parts[name] * times for name, times in PLAIN.items())


def plain(sizes: Sizes, sequences: float, length: int) -> Work:
    """One plain pass through all blocks."""
    return total(forward(sizes, sequences, length, sizes.window(i)) for i in range(sizes.shape.blocks))


def streams(sizes: Sizes, sequences: float, length: int, online: Online, window: int | None = None) -> Work:
    """Stage `forward`: both streams through a block, with online rotations and quantizers."""
    s, tokens = sizes.shape, sequences * length
    parts = parts_of_block(sizes, sequences, length, window)
    work = total(parts[name] * times for name, times in (EXPERTS if s.experts else BOTH).items())
    heads, active = s.query_heads + s.key_heads, tokens * sizes.routed
    if online.r3:
        work += 2 * hadamard(tokens * heads, s.head_dim)
    if online.r4:
        work += 2 * hadamard(active, s.ffn)
    if online.r1 == "online" or (online.r1 == "merged" and sizes.post_norms):
        work += 7 * hadamard(tokens, s.hidden)
    if online.heads:
        work += 2 * hadamard(tokens, s.query_width)
    if online.activations:
        tries = len(RATIOS) + 1 if online.search_activations else 1
        work += moved(tokens * (4 * s.hidden + s.query_width) + active * s.ffn, tries * QUANTIZER)
    if online.cache:
        work += moved(tokens * 4 * s.key_width, (len(RATIOS) + 1 if online.search_cache else 1) * QUANTIZER)
    return work


def input_statistics(sizes: Sizes, sequences: float, length: int, batch: int) -> Work:
    """H_in, T c (c + 1), of four inputs; R of attention's and the MLP's, 2 T c^2; drift of O's and down's, 2 T h c."""
    s, tokens = sizes.shape, sequences * length
    batches = math.ceil(sequences / batch)

    def layer(n: float, columns: int, outputs: int, count: float) -> Work:
        shift = Work(2 * n * outputs * columns, bytes=FLOAT * (n * outputs + 2 * count * outputs * columns))
        return gram(n, columns, count) + shift + moved(n * (columns + outputs), WEIGHTED)

    each, experts = tokens, max(s.experts, 1)
    if s.experts:  # an expert with fewer tokens than channels is calibrated on a pool
        each = tokens * sizes.routed / s.experts
        each = each if each >= s.hidden else min(tokens, POOL * s.hidden)
    mlp = layer(each, s.hidden, s.hidden, batches) + layer(each, s.ffn, s.hidden, batches)
    return layer(tokens, s.hidden, s.hidden, batches) + layer(tokens, s.query_width, s.hidden, batches) + experts * mlp


def head_statistics(s: Shape, tokens: float) -> Work:
    """K^T K and Q^T Q: 2 T d (H + G) d."""
    width = s.query_width + s.key_width
    return Work(2 * tokens * width * s.head_dim, bytes=FLOAT * tokens * width)


def value_statistics(s: Shape, sequences: float, length: int, window: int | None = None, stride: int = 1) -> Work:
    """H_in and drift of the values by every `stride`-th query, the cheaper of two ways; P pairs, n_l keys that l sees.

    Logits: 2 H d P. By group W X, 2 G d L c; A V and its pull-back, 4 H d P; the sum of A^T A, one half,
    H sum n_l (n_l + 1); products with X, 2 G (L^2 c + L c^2) + 2 G d L c. Or by head A X and its Gram,
    2 H P c + H L c (c + 1), and with it the outputs and their product, 4 H d L c.
    """
    seen, c, heads, groups = pairs(length, window), s.hidden, s.query_heads, s.key_heads
    w = min(length, window or length)
    squares = w * (w + 1) * (w + 2) // 3 + (length - w) * w * (w + 1)
    grouped = (heads * squares + 4 * s.query_width * seen) / stride
    grouped += 2 * groups * (length**2 * c + length * c**2) + 4 * s.key_width * length * c
    by_head = 2 * heads * seen * c + heads * length * c * (c + 1) + 4 * s.query_width * length * c
    products = 2 * s.query_width * seen / stride + min(grouped, by_head / stride)
    moves = heads / groups * length / stride * c + 2 * c * c * groups + length * 2 * s.query_width
    return sequences * (Work(products, elements=SOFTMAX * heads * seen / stride) + moved(moves, 1))


def rotation(sizes: Sizes, *, r1: bool, r2: bool, r4: bool, heads: bool = False) -> Work:
    """In float64: R1 on one side of every matrix, R2 on one side of V and O, heads of O alone, R4 of down."""
    s, work = sizes.shape, Work(bytes=2 * DOUBLE * sizes.block_weights)
    experts = max(s.experts, 1)
    if r1:
        work += hadamard(sizes.block_weights / s.hidden, s.hidden, wide=True)
    if r2:
        work += hadamard((s.key_width + s.query_width) * s.hidden / s.head_dim, s.head_dim, wide=True)
    if heads:
        work += hadamard(s.hidden, s.query_width, wide=True)
    if r4:
        work += hadamard(experts * s.hidden, s.ffn, wide=True)
    return work
