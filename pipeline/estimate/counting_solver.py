"""Operations and bytes of solving what shares an input, by stage; notation and kinds as in `counting`.

B Hessians of c x c, R rows of all heads together, r rows of a head; K rounds of refinement and S grids of a row are
the most that the settings allow: rows and rounds in which nothing moves are left out when a run meets them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...boa.solver.columns import COLUMN_BLOCK
from ...boa.solver.grid import SHRINKS
from ...boa.solver.references import PLAIN as REFERENCE
from ...boa.solver.rounding import Settings
from ...boa.solver.tabu import WIDTH
from .counting import (
    DOUBLE,
    FLOAT,
    Sizes,
    Work,
    linear,
    moved,
)

TABU = 8  # operations on a column in a move of tabu search, whose row stays in cache
GRID, GRID_MOVES = 13, 16  # operations of a weight on a candidate grid; how often its error crosses to memory
LEARNED = 40  # operations of a weight in a step of learned rounding, beside its products
STEP = 8  # operations of a weight that is rounded, or moved by coordinate descent, beside its products


@dataclass(frozen=True)
class Problem:
    """Projections that share an input and are solved together, as `Workspace._solve` stacks them.

    Attributes:
        heads, rows, columns: r rows of c columns for each head.
        hessians: B, 1 or one for each head.
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
        """R."""
        return self.heads * self.rows


def problems(sizes: Sizes) -> Iterator[Problem]:
    """What is solved in one block, in its order."""
    s = sizes.shape
    experts = max(s.experts, 1)
    yield Problem("query and key", s.query_heads + s.key_heads, s.head_dim, s.hidden, 1, True, "residual")
    yield Problem("value", s.key_heads, s.head_dim, s.hidden, s.key_heads, True, "drift")
    yield Problem("output", 1, s.hidden, s.query_width)
    yield Problem("gate and up", sizes.inputs, s.ffn, s.hidden, shift="residual", count=experts)
    yield Problem("down", 1, s.hidden, s.ffn, count=experts)


def lazy(columns: int, width: int = COLUMN_BLOCK) -> int:
    """Sum over blocks of `width` columns of (columns in it) x (columns after it)."""
    return sum(min(width, columns - i) * max(columns - i - width, 0) for i in range(0, columns, width))


def factors(p: Problem, settings: Settings, *, again: bool = False) -> Work:
    """In float64: the check while damping and the inverse factor, c^3 / 3 + 2 c^3 / 3 for each Hessian.

    Of the target another c^3 / 3, and 2 R c^2 for its two triangular solves; W R, or once W H_in to be taken from the
    outputs that are wanted, 2 R c^2 in float32. `again`: the objective is there already.
    """
    cubes = p.hessians * p.columns**3 + (p.heads * p.rows**3 if p.tied else 0)
    squares = p.hessians * p.columns**2 + (p.heads * p.rows**2 if p.tied else 0)
    shifts = {"residual": bool(settings.alpha), "wanted": not again, "drift": False}
    work = shifts[p.shift] * linear(p.all_rows, p.columns, p.columns)
    work += Work(wide=cubes, bytes=DOUBLE * 12 * squares)
    if settings.alpha:
        work += Work(wide=p.hessians * p.columns**3 / 3 + 2 * p.all_rows * p.columns**2)
        work += Work(bytes=DOUBLE * (2 * p.hessians * p.columns**2 + 4 * p.all_rows * p.columns))
    return work


def grid_search(p: Problem, settings: Settings) -> Work:
    """R c weights on S candidate grids, 48 shrinks and both roundings of an asymmetric zero point.

    By the diagonal of H_in the error stays in cache (compiled; on CUDA it is written out). By all of H_in it is written
    out, and counts 2 R c S g with g columns in a group.
    """
    weights = p.all_rows * p.columns
    if settings.grid == "minmax":
        return moved(weights, 4)
    tries = weights * SHRINKS * (1 if settings.symmetric else 2)
    work = Work(elements=GRID * tries) + moved(weights, 2)
    if settings.grid == "diagonal":
        return work
    return work + Work(2 * tries * (settings.group_size or p.columns)) + moved(tries, GRID_MOVES)


def columns(p: Problem, settings: Settings) -> Work:
    """In blocks of w = 128: R c (w - 1) in cache, then 2 R w for each column that comes after a block."""
    width, weights = min(COLUMN_BLOCK, p.columns), p.all_rows * p.columns
    blocks = math.ceil(p.rows / settings.rows) if p.tied else 1
    after, calls = lazy(p.columns), p.hessians * blocks
    return (
        Work(2 * p.all_rows * after, elements=weights * (width - 1 + STEP))
        + moved(p.all_rows * after / width, 3)
        + moved(calls * p.columns**2 / 2, 1)
        + moved(weights, 8)
    )


def rows(p: Problem, settings: Settings) -> Work:
    """H_out: for n rows at a time, n^2 c to solve and 2 n c for each row of the head below; copies of the weights."""
    work = moved(p.all_rows * p.columns, 8)
    if not p.tied:
        return work
    n = min(settings.rows, p.rows)
    below = lazy(p.rows, n)
    products = p.heads * p.columns * (2 * below + n * (math.ceil(p.rows / n) - 1) * n)
    return work + Work(products, bytes=FLOAT * p.heads * p.columns * (2 * below / n + 2 * p.rows))


def refinement(p: Problem, settings: Settings) -> Work:
    """E H_in, 2 R c^2, before and in each of K sweeps; in cache R c (w - 1) a sweep.

    (I - z) H_in follows with one group, another product before the first. H_out: 4 r R c for the scales and 2 r R c
    for the gradients of a sweep. On a processor E H_in follows single steps, not products: its factor says how much
    less that takes.
    """
    if not settings.refine:
        return Work()
    weights, width, k = p.all_rows * p.columns, min(COLUMN_BLOCK, p.columns), settings.refine
    square = Work(2 * weights * p.columns)
    before = square * (1 if settings.group_size else 2)
    sweep = square + Work(elements=weights * (width - 1 + STEP)) + moved(weights * (p.columns / width + 3), 4)
    scales = moved(weights, 6)
    if p.tied:
        sweep += Work(elements=2 * p.rows * weights)
        scales += Work(4 * p.rows * weights)
    return before + k * sweep + (k + 1) * scales


def tabu(p: Problem, settings: Settings) -> Work:
    """Products before and after, 2 R c^2 each, and in cache `TABU` operations on each column of a row for each move.

    Columns are taken `tabu.WIDTH` at a time, each part with moves of its own. H_out: 2 r R c for the gradients.
    """
    if not settings.tabu:
        return Work()
    weights, width = p.all_rows * p.columns, min(WIDTH, p.columns)
    found = Work(4 * weights * p.columns, elements=TABU * settings.tabu * weights * width) + moved(weights, 6)
    if p.tied:
        found += Work(2 * p.rows * weights)
    return found + refinement(p, settings)


def learning(p: Problem, settings: Settings) -> Work:
    """The gradient of the objective in each step, and `LEARNED` on a weight; brecq has none by layer."""
    if settings.method not in ("adaround", "aespa"):
        return Work()
    step = losses(p, 1) + Work(elements=LEARNED * p.all_rows * p.columns)
    return settings.iterations * step + refinement(p, settings)


def losses(p: Problem, times: int) -> Work:
    """tr(H_out E H_in E^T): 2 R c^2, and 2 r R c with H_out."""
    one = linear(p.all_rows, p.columns, p.columns)
    return times * (one + Work(2 * p.rows * p.all_rows * p.columns) if p.tied else one)


def starts(p: Problem, settings: Settings) -> Work:
    """Everything but the grid search again for each start after the first; factors again where heads have their own."""
    more = settings.starts - 1
    if more < 1:
        return Work()
    again = columns(p, settings) + rows(p, settings) + refinement(p, settings) + losses(p, 1)
    cubes = (more * p.hessians if p.hessians > 1 else 1) * p.columns**3 + (more * p.heads * p.rows**3 if p.tied else 0)
    return more * again + losses(p, 1) + Work(wide=2 * cubes / 3)


def references(p: Problem, settings: Settings) -> Work:
    """Plain GPTQ, and the objective at its result, at RTN's and at the run's."""
    gptq = replace(settings, method="gptq", **REFERENCE)
    alone = replace(p, tied=False)
    both = factors(p, settings, again=True) + factors(alone, gptq, again=True)
    both += grid_search(p, gptq) + columns(alone, gptq) + losses(alone, 1)
    return both + rows(alone, gptq) + losses(p, 4)


def solve(p: Problem, settings: Settings) -> dict[str, Work]:
    """One problem by stage; RTN has no Hessians to factor."""
    if settings.method == "rtn":
        return {"grid search": grid_search(p, settings), "losses": losses(p, 2)}
    q = p if settings.method in ("boa", "aespa", "brecq") else replace(p, tied=False)
    return {
        "factors": factors(p, settings),
        "grid search": grid_search(q, settings),
        "columns": columns(q, settings),
        "rows": rows(q, settings),
        "refinement": refinement(q, settings) + learning(q, settings),
        "starts": starts(q, settings),
        "search": tabu(q, settings),
        "losses": losses(p, 5 if settings.tabu else 3),
    }
