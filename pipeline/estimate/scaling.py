"""A run on several devices, estimated: seconds, bytes on the wire, memory.

Calibration is data-parallel: a rank has its share of the sequences, and Hessians and targets are summed by a ring
all-reduce, of which every rank sends 2 (N - 1) / N of the bytes. Solving is work-parallel: heads, rows and experts go
to ranks, the largest first, and a ring all-gather brings every rank the results, (N - 1) / N of their bytes. A Hessian
that all rows share is factored by every rank that has some of them. Each rank reads and rotates the block for itself.
Transfers are taken to hide behind nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .counting import DOUBLE, FLOAT, Sizes, Work, plain
from .counting_run import Plan, block, evaluation, head
from .counting_solver import Problem, problems, references, solve
from .footprint import footprint
from .machines import Machine

SHARED = ("rotation",)  # every rank does all of it
STATISTICS = ("forward", "input statistics", "head statistics", "value statistics")
LEVEL = 1  # bytes of an integer as it is exchanged


@dataclass(frozen=True)
class Estimate:
    """Of one stage: seconds of computing and of transfers, and the bytes that each rank sends."""

    seconds: float = 0.0
    transfer: float = 0.0
    wire: float = 0.0

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.seconds + other.seconds, self.transfer + other.transfer, self.wire + other.wire)

    def __mul__(self, times: float) -> Estimate:
        return Estimate(self.seconds * times, self.transfer * times, self.wire * times)

    @property
    def total(self) -> float:
        """Seconds of both."""
        return self.seconds + self.transfer


def makespan(costs: Iterable[float], ranks: int) -> float:
    """When the last rank is done if tasks go, the largest first, to the rank with the least so far."""
    loads = [0.0] * ranks
    for cost in sorted(costs, reverse=True):
        heapq.heappush(loads, heapq.heappop(loads) + cost)
    return max(loads)


def triangle(columns: int) -> int:
    """Elements of a Gram on and below the diagonal, in the blocks of columns of `boa.grams.add_gram`."""
    width = max(64, -(-columns // 4))
    return sum(min(width, columns - start) * (columns - start) for start in range(0, columns, width))


def summed(sizes: Sizes) -> int:
    """Bytes of a block's statistics, summed in float64: four Grams, what shifts targets, H_out, the values' own."""
    s = sizes.shape
    hidden, query, ffn = s.hidden, s.query_width, s.ffn
    attention = triangle(hidden) + hidden**2 + triangle(query) + hidden * query
    mlp = triangle(hidden) + hidden**2 + triangle(ffn) + hidden * ffn
    heads = 2 * s.key_heads * s.head_dim**2 + s.key_heads * triangle(hidden) + s.key_width * hidden
    return DOUBLE * (attention + max(s.experts, 1) * mlp + heads)


def gathered(sizes: Sizes, group_size: int | None) -> int:
    """Bytes of a block's integers, scales and zero points."""
    return sum(
        p.count * p.all_rows * (LEVEL * p.columns + 2 * FLOAT * (p.columns // (group_size or p.columns)))
        for p in problems(sizes)
    )


def solving(p: Problem, run: Plan, machine: Machine, ranks: int) -> dict[str, float]:
    """Seconds of one kind of problem by stage: factors once in each of its pieces, the rest shared out."""
    units = p.heads if p.tied else p.all_rows
    pieces = min(units, max(1, math.ceil(ranks / p.count)))
    largest = math.ceil(units / pieces) / units
    stages = solve(p, run.settings)
    if run.references:
        stages["references"] = references(p, run.settings)

    def piece(name: str, work: Work) -> float:
        whole = name == "factors" and p.hessians == 1
        return machine.seconds(work, name) * (1 if whole else largest)

    costs = {name: piece(name, work) for name, work in stages.items()}
    one = sum(costs.values())
    rounds = makespan([one] * (pieces * p.count), ranks) / one if one else 0.0
    return {name: cost * rounds for name, cost in costs.items()}


def estimate(sizes: Sizes, run: Plan, machine: Machine, ranks: int = 1) -> dict[str, Estimate]:
    """A whole run by stage, `plain forward pass` and `evaluation` with it; `sums` and `results` are transfers."""
    samples, evaluated = (math.ceil(count / ranks) for count in (run.samples, run.windows))
    share = replace(run, samples=samples, windows=evaluated, all_samples=run.samples)
    ring = (ranks - 1) / ranks
    blocks = sizes.shape.blocks

    def stage(name: str, work: Work) -> Estimate:
        return Estimate(machine.seconds(work, name))

    def sent(count: float) -> Estimate:
        return Estimate(transfer=machine.transfer(count, ranks), wire=count if ranks > 1 else 0.0)

    found = {"plain forward pass": stage("plain forward pass", plain(sizes, share.samples, run.length))}
    windows = [sizes.window(i) for i in range(blocks)]
    for window in sorted(set(windows), key=str):
        count = windows.count(window)
        mine = block(sizes, share, window)
        for name in (*SHARED, *STATISTICS):
            if mine[name] != Work():
                found[name] = found.get(name, Estimate()) + stage(name, mine[name]) * count
    for p in problems(sizes):
        for name, seconds in solving(p, run, machine, ranks).items():
            found[name] = found.get(name, Estimate()) + Estimate(seconds * blocks)
    if run.head:
        found["head"] = stage("head", head(sizes, share.samples * run.length))
    if ranks > 1:
        found["sums"] = sent(2 * ring * summed(sizes) * blocks)
        found["results"] = sent(ring * gathered(sizes, run.settings.group_size) * blocks)
    if run.windows:
        found["evaluation"] = stage("evaluation", evaluation(sizes, share))
    return found


def device_memory(sizes: Sizes, run: Plan, ranks: int = 1) -> float:
    """Bytes on each device where most are; its share of both streams is in the host's memory."""
    pieces = {
        p.name: min(p.heads if p.tied else p.all_rows, max(1, math.ceil(ranks / p.count))) for p in problems(sizes)
    }
    return footprint(sizes, run, pieces=pieces).device
