"""How fast this machine is, measured in a second, and the seconds that counted work takes on it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from statistics import median

import torch

from .counting import Work

SLOWEST = {"products": 1e9, "wide": 5e8, "elements": 1e8, "bandwidth": 1e9}
"""Rates that one core of any processor of today reaches: what is measured below them is not of the machine."""
LEAST_RUNS, MOST_RUNS, SPENT = 5, 200, 0.1  # of a measurement: as many runs as there is time for, in seconds
UNEVEN = 3.0  # a median of all runs so many times the best one: something else is at work
IN_THE_WAY = 1.5  # one thread so many times as fast as all of them: they wait for each other


def calibrated() -> dict[str, float]:
    """How many times as long as its counts each stage takes on a processor.

    `make speed ARGS=--write` writes them to factors.json: medians over its recipes, on the embedded model. Its small
    matrices make calls dear, so stages of few operations (rotation, factors) come out too long elsewhere.
    """
    text = (resources.files("rotoboa.pipeline.estimate") / "factors.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


@dataclass(frozen=True)
class Machine:
    """Rates of one device.

    Attributes:
        products, wide, elements: operations a second, by the kinds of `Work`.
        bandwidth: bytes a second to and from memory.
        disturbed: the kinds that something else was at work beside while they were measured, as far as it shows.
        factors: by stage, how many times what is counted it takes; 1 where there is none.
    """

    name: str
    products: float
    wide: float
    elements: float
    bandwidth: float
    disturbed: tuple[str, ...] = ()
    factors: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, work: Work, stage: str = "") -> float:
        """What each kind of work takes, times the stage's factor."""
        computing = work.products / self.products + work.wide / self.wide + work.elements / self.elements
        return (computing + work.bytes / self.bandwidth) * self.factors.get(stage, 1.0)

    @property
    def rates(self) -> dict[str, float]:
        """By kind."""
        return {kind: getattr(self, kind) for kind in SLOWEST}


def measured(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Machine:
    """This machine, by short products, sums in cache and copies, of each the best; a second on a processor.

    What else is at work can only make them slower, so one undisturbed run is enough. On a processor one thread is
    measured too: where others want its cores, several wait for each other in every run. A rate is `SLOWEST` at least.
    """
    large, threads = device.type == "cuda", torch.get_num_threads()
    found, disturbed = _rates(device, clock, 8192 if large else 1024)
    if not large and threads > 1:
        torch.set_num_threads(1)
        try:
            alone, uneven = _rates(device, clock, 512)
        finally:
            torch.set_num_threads(threads)
        disturbed |= uneven | {kind for kind in found if alone[kind] > IN_THE_WAY * found[kind]}
        found = {kind: max(rate, alone[kind]) for kind, rate in found.items()}
    disturbed |= {kind for kind, rate in found.items() if rate < SLOWEST[kind]}
    rates = {kind: max(rate, SLOWEST[kind]) for kind, rate in found.items()}
    return Machine(
        str(device),
        products=rates["products"],
        wide=rates["wide"],
        elements=rates["elements"],
        bandwidth=rates["bandwidth"],
        disturbed=tuple(kind for kind in rates if kind in disturbed),
    )


def _rates(device: torch.device, clock: Callable[[], float], size: int) -> tuple[dict[str, float], set[str]]:
    """Operations and bytes a second by kind, of products of `size`, and the kinds whose runs were uneven."""
    large = device.type == "cuda"
    x = torch.randn(2**22 if large else 2**16, device=device)
    out = torch.empty_like(x)
    source = torch.zeros(2**28 if large else 2**24, device=device)
    target = torch.zeros_like(source)

    def sums() -> None:
        for _ in range(16):
            torch.addcmul(x, x, x, out=out)

    def product(n: int, dtype: torch.dtype) -> tuple[float, Callable[[], object]]:
        a = torch.randn(n, n, device=device, dtype=dtype)
        return 2 * n**3, lambda: a @ a

    runs: dict[str, tuple[float, Callable[[], object]]] = {
        "products": product(size, torch.float32),
        "wide": product(size // 2, torch.float64),
        "elements": (16 * 2 * x.numel(), sums),
        "bandwidth": (2 * 4 * source.numel(), lambda: target.copy_(source)),
    }
    rates, uneven = {}, set()
    for kind, (work, run) in runs.items():
        times = _times(run, device, clock)
        rates[kind] = work / max(min(times), 1e-9)
        if median(times) > UNEVEN * min(times):
            uneven.add(kind)
    return rates, uneven


def _times(run: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> list[float]:
    """Seconds of each of several runs."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    times: list[float] = []
    while len(times) < LEAST_RUNS or (sum(times) < SPENT and len(times) < MOST_RUNS):
        start = now()
        run()
        times.append(now() - start)
    return times
