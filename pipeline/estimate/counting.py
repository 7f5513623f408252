"""Operations of a run by stage, counted from sizes: what `inspect` divides by the rates of a machine.

A multiplication and an addition are two. Counted are the terms that grow fastest: the matrix products of forward
passes, of statistics and of rounding, factorisations, and what a processor does element by element in its cache. All
else, from norms to the calls themselves, is in a stage's factor (`machines.calibrated`).

Notation: T tokens in sequences of L, a layer of r rows and c columns, H query heads in G groups, d channels a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

from ...boa.block.block_output import TOKENS
from ...boa.block.experts_step import POOL
from ...boa.objective.fisher import LEAST, ROWS
from ...boa.objective.statistics import PROBABILITIES, value_stride
from ...boa.solver.columns import COLUMN_BLOCK
from ...boa.solver.grid import SHRINKS
from ...boa.solver.rounding_settings import LAYERWISE
from .workload import Plan, Sizes, Stack, before_mlp, problems

SOURCE_WINDOWS = 4  # of text that sources are measured on, at most: every block runs twice for each
STREAMS, EXPERTS = 2, 3.5  # passes of both streams; with experts, which are needed before and after they are solved
QUANTIZER = 12  # operations of a number in one try of a quantizer, the rotation before it among them
GRID = 13  # of a weight on a candidate grid
TABU = 8  # of a column in a move of the tabu search
LEARNED = 40  # of a weight in a step of learned rounding, beside its products
ROUNDING = ("grid search", "columns", "rows", "refinement", "search", "starts", "losses", "references")
"""Stages of `boa.stopwatch` that are one here, `rounding`; the others have their names."""


@dataclass(frozen=True)
class Work:
    """Operations of float32 products, of float64 ones, and in cache; bytes that cross to memory."""

    products: float = 0.0
    wide: float = 0.0
    elements: float = 0.0
    bytes: float = 0.0

    @property
    def operations(self) -> float:
        """Of all kinds."""
        return self.products + self.wide + self.elements


def whole(sizes: Sizes, run: Plan) -> dict[str, Work]:
    """A whole run by stage; reading text, downloads and tasks are not in it."""
    s, tokens, kinds = sizes.shape, run.samples * run.length, sizes.kinds()
    weights = sum(kind.shape.blocks * kind.block_weights for kind in kinds)
    solving = sum(k.shape.blocks * p.count * factors(p, run) for k in kinds for p in problems(k))
    moved_head = 3 * tokens * s.hidden**2 + 4 * s.vocabulary * s.hidden**2 if run.head else 0.0
    stages = {
        "plain forward pass": Work(tokens * token(sizes, run.length)),
        "forward": forward(sizes, run),
        "input statistics": Work(
            sum(k.shape.blocks * (input_statistics(k, tokens) + run.directions * moments(k, tokens)) for k in kinds)
        ),
        "head statistics": Work(sum(k.shape.blocks * head_statistics(k, run) for k in kinds if k.attends)),
        "value statistics": Work(sum(value_statistics(kind, run) for kind in kinds if kind.attends)),
        "factors": Work(wide=solving),
        "rounding": rounding(sizes, run),
        "rotation, packing, head": Work(moved_head, bytes=8 * tokens * s.hidden + 24 * weights),
        "evaluation": evaluation(sizes, run),
    }
    if run.settings.method in LAYERWISE:
        del stages["head statistics"], stages["value statistics"]
    if run.settings.method == "rtn":
        del stages["factors"]
    return {name: work for name, work in stages.items() if work != Work()}


def keys(sizes: Sizes, length: int) -> float:
    """How many keys a token sees, on average: with all before it (L + 1) / 2."""
    seen = [min(length, window or length) for window in sizes.windows or (None,)]
    return mean(w * (w + 1) / 2 + (length - w) * w for w in seen) / length


def token(sizes: Sizes, length: int) -> float:
    """One token in a pass through all blocks: 2 r c of each layer it meets, 4 H d for each key it sees.

    What a recurrence or a convolution does between its layers is not counted.
    """
    return sum(kind.shape.blocks * (2 * kind.weights(kind.routed) + _met(kind, length)) for kind in sizes.kinds())


def _met(kind: Sizes, length: int) -> float:
    """Of a token with the keys that it sees, in one block."""
    each = 4 * kind.shape.query_width if kind.own is None else kind.own.keys
    return each * keys(kind, length) if each else 0.0


def quantized(sizes: Sizes, run: Plan) -> float:
    """In cache, of one token in a pass of all blocks: the quantizers of inputs and of cached keys and values."""
    found = 0.0
    for kind in sizes.kinds():
        s, *_, output = kind.shape, *before_mlp(kind)
        inputs = 2 * s.hidden + output.columns + kind.routed * s.ffn + s.shared_ffn
        cached = 2 * s.key_width if kind.attends else 0
        found += s.blocks * (run.activation_tries * inputs + run.cache_tries * cached)
    return QUANTIZER * found


def forward(sizes: Sizes, run: Plan) -> Work:
    """Both streams, the quantized one before and after its layers are solved; brecq: a step is three passes.

    One more where leading directions are looked for.
    """
    tokens, passes = run.samples * run.length, (EXPERTS if sizes.shape.experts else STREAMS) + run.directions
    steps = 3 * run.settings.iterations * min(TOKENS, tokens) if run.settings.method == "brecq" else 0
    return Work((passes * tokens + steps) * token(sizes, run.length), elements=2 * tokens * quantized(sizes, run))


def input_statistics(sizes: Sizes, tokens: float) -> float:
    """Of a block: half of H_in, T c^2, of each input, and R, 2 T c^2, or what outputs lack, 2 T h c."""
    s, each = sizes.shape, tokens
    if s.experts:  # an expert with fewer tokens than channels is calibrated on a pool
        each = tokens * sizes.routed / s.experts
        each = each if each >= s.hidden else min(tokens, POOL * s.hidden)

    def layer(n: float, columns: int) -> float:
        return n * columns * (columns + 2 * s.hidden)

    attention = sum(layer(tokens, p.columns) for p in before_mlp(sizes) if p.shift != "drift")
    shared = layer(tokens, s.hidden) + layer(tokens, s.shared_ffn) if s.shared_ffn else 0.0
    return attention + shared + max(s.experts, 1) * (layer(each, s.hidden) + layer(each, s.ffn))


def moments(sizes: Sizes, tokens: float) -> float:
    """Of a block: half of the Gram of each input that has leading directions, T c^2; its eigenvectors are left out."""
    return tokens * (2 * sizes.shape.hidden**2 + before_mlp(sizes)[-1].columns ** 2)


def head_statistics(sizes: Sizes, run: Plan) -> float:
    """Of a block: Grams of queries and keys; or what `fisher` makes of every n-th query, by chunks."""
    s, tokens = sizes.shape, run.samples * run.length
    if run.settings.attention == "bound":
        return 2 * tokens * (s.query_width + s.key_width) * s.head_dim
    stride = value_stride(tokens, 1, s.head_dim, ROWS)
    step = -(-max(LEAST, min(run.length, PROBABILITIES // (s.query_heads * run.length))) // stride) * stride
    chunks = [(min(start + step, run.length), start) for start in range(0, run.length, step)]
    met = sum(end * (s.head_dim + 1 + 2 * (end - start) / stride) for end, start in chunks)
    return run.samples * 2 * s.query_width * (met + 2 * s.head_dim * run.length / stride)


def value_statistics(sizes: Sizes, run: Plan) -> float:
    """By every n-th query: A X of each head, half of its Gram and its outputs, or a group's sum of A^T A: the less."""
    s, tokens, seen = sizes.shape, run.samples * run.length, keys(sizes, run.length)
    c = next(p.columns for p in before_mlp(sizes) if p.name == "value")
    stride = value_stride(tokens, s.query_heads // s.key_heads, s.hidden, run.settings.value_rows)
    rows = tokens * s.query_heads / stride
    by_head = rows * c * (2 * seen + c + 4 * s.head_dim)
    grouped = rows * seen * seen * 4 / 3 + 2 * s.key_heads * tokens * c * (run.length + c)
    return s.blocks * (2 * rows * seen * s.head_dim + min(by_head, grouped))


def factors(p: Stack, run: Plan) -> float:
    """c^3 / 3 for each of four factors or inverses, and 2 r c^2 for the solves that shift the target."""
    return 4 / 3 * p.hessians * p.columns**3 + (2 * p.all_rows * p.columns**2 if run.settings.alpha else 0)


def rounding(sizes: Sizes, run: Plan) -> Work:
    """2 r c^2, and `COLUMN_BLOCK` operations of a weight in cache, whenever all columns of the rows are gone through.

    So often: once to round, once in each sweep of refinement; again for each start, and after a tabu search; products
    alone for the losses. H_out ties the rows of a head: 2 r^2 c beside them.
    """
    settings, products, cached = run.settings, 3.0, 0.0
    if settings.method != "rtn":
        sweeps = settings.refine + 2 if settings.refine else 0
        products += settings.starts * (1 + sweeps) + (2 + sweeps if settings.tabu else 0)
        cached += settings.starts * (1 + settings.refine)
        cached += settings.refine + TABU * settings.tabu if settings.tabu else 0
        products, cached = (products + 5, cached + 1) if run.references else (products, cached)
    elements = cached * COLUMN_BLOCK + GRID * SHRINKS * (1 if settings.symmetric else 2)
    if settings.method in ("adaround", "aespa"):
        products += settings.iterations
        elements += settings.iterations * LEARNED
    tied = settings.method not in LAYERWISE
    squares = sum(
        kind.shape.blocks * p.count * p.all_rows * p.columns * (p.columns + p.rows * (p.tied and tied))
        for kind in sizes.kinds()
        for p in problems(kind)
    )
    weights = sum(kind.shape.blocks * kind.block_weights for kind in sizes.kinds())
    return Work(2 * products * squares, elements=elements * weights)


def evaluation(sizes: Sizes, run: Plan) -> Work:
    """A pass and the logits of full precision, of RTN where it is asked for, and of the result; and the sources."""
    s, tokens = sizes.shape, run.windows * run.length
    some = min(run.windows, SOURCE_WINDOWS) * run.length
    passes = (3 if run.baseline else 2) * tokens + (2 + 2 * run.sources) * some * bool(run.sources)
    logits = (3 if run.baseline else 2) * tokens + (2 + run.sources) * some * bool(run.sources)
    return Work(
        passes * token(sizes, run.length) + logits * 2 * s.vocabulary * s.hidden,
        elements=tokens * quantized(sizes, run),
    )
